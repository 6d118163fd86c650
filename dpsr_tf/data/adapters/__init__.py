"""Data sets known by name: NAME.yaml is the schema and, where the published files are no plain tables of it, NAME.py.

NAME.py has `convert(source, out)`, which streams the published files of the directory `source` into plain tables in the
existing, empty directory `out`; the schema names these. docs/adapters.md says what each set is, and what becomes of it.
"""
