"""Training data: from files to batches. Data workers import this: no JAX in here.

In import order: `cache`, `index`, `sources`, `records`, `workers`, `lengths`, `measures`,
`dataset`, `epochs`, `loader`.
"""
