"""Statistics of batch norm layers as numbers: moments, their merge, drift, tables, files."""
