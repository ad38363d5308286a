"""One record of a data file as a sample.

In import order: `sample`, `fields`, `other_fields`, `turns`, `shapes`, `media`, `reader`.
"""
