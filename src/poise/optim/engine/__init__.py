"""How a rule is run: parameters planned into buckets, rules and formats compiled once each, tiles driven over many tensors.

Nothing here knows any rule. `engine.py` is one step of an optimizer; read it first, then `bucket.py` and `program.py`.
"""
