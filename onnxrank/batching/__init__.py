"""Several requests in one call: a model for one request is made into one for many.

`rows.py` is what the new graph knows of its requests, `tensors.py` where the rows of a tensor lie, `writer.py` brings
them elsewhere, `rules.py` says what becomes of every operator, and `engine.py` is the entry.
"""
