"""One HTML page about a run's mismatch between rollout and trainer; needs the extra `report`.

r3 report folder --out report.html
"""
