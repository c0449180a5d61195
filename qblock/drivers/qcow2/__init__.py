"""The qcow2 image format: header and tables (pure), caches and their write-back, mapping, allocation, check, create, driver.

Read `layout.py` for the form of the tables, then `refcounts.py`, `writeback.py` and `clusters.py`, which hold the theory of crash
safety and concurrency; `driver.py` puts them together. Importing the package imports none of them.
"""
