"""Ask TensorFlow Serving over REST; nothing but Python's library is needed.

python rest_client.py images.npy [host:8501] [model]
"""

import json
import sys
import urllib.request

import numpy as np

file, host, model = [*sys.argv[1:], "localhost:8501", "digits"][:3]
request = {"instances": np.load(file).tolist()}  # One entry a sample.
url = f"http://{host}/v1/models/{model}:predict"
with urllib.request.urlopen(url, json.dumps(request).encode()) as answer:
    print(np.array(json.load(answer)["predictions"]).argmax(-1))
