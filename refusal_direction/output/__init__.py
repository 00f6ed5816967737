"""Output: results in files and as text.

artifacts  writes a run to files as one set, and reads it back
run_files  the content of these files
plain      dataclasses to JSON and back
text       the list of files, completions side by side
"""
