"""Read and write files: arrays with a checksum, and atomic files and folders."""
