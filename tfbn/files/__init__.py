"""Bytes on disk: sealed arrays, and files and folders that are whole or not there."""
