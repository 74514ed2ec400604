"""What disks, networks and people do to files, for the tests of all that is read from them."""

import re


def damaged(content, random):
    """Content with a stretch of it changed, mostly where an archive or an array has its header.

    Args:
        content: The bytes of a ZIP archive, of NumPy arrays perhaps, or of a safetensors file.
        random: A `random.Random`.
    """
    content = bytearray(content)
    at, n = random.randrange(len(content)), random.randrange(1, 40)
    mark = random.choice([b"PK", b"NUMPY", b"data_offsets", b"sha256", None])
    starts = [actual.start() for actual in re.finditer(mark or b"^$", content)]
    if starts:
        at = min(random.choice(starts) + random.randrange(80), len(content) - 1)
    kind = random.choice(["bit"] * 6 + ["byte", "cut", "drop", "zero", "copy", "append"])
    if kind == "bit":
        content[at] ^= 1 << random.randrange(8)
    elif kind == "byte":
        content[at] = random.randrange(256)
    elif kind == "cut":
        del content[at:]
    elif kind == "drop":
        del content[at : at + n]
    elif kind == "zero":
        content[at : at + n] = bytes(len(content[at : at + n]))
    elif kind == "copy":
        to = random.randrange(len(content))
        content[to : to + n] = content[at : at + n]
    else:
        content += random.randbytes(n)
    return bytes(content)
