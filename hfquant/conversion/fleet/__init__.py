"""A publisher's models, kept converted: what is wanted, as data; what is there, asked of the Hub; the difference, done.

manifest.py  what is wanted, strict YAML
sight.py     what is there: originals and results, on the Hub
wanted.py    manifest and originals -> every pair of model and recipe
verdict.py   one pair: up to date, missing, stale, foreign, failed, blocked, running
reconcile.py the whole fleet: the plan, and enqueueing exactly what it says
"""
