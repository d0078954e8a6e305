"""The web page: pick a model and a recipe, see what it will cost, start, come back later.

Thin: all that is decided or done is in `hfquant.conversion`; here it is only asked for and shown.
"""
