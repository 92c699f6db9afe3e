"""The files in which other programs take a student: single files in the original layout, and adapters.

No function here writes. Each turns a loaded pipeline into tensors by the names that other programs know.
"""
