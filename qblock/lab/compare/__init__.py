"""``qblock lab compare``: one guest, one chain of images, and every way of moving the disk elsewhere that was proposed or built.

Each strategy is carried out once, on virtual time, on real image files behind modelled disks, with the same list of guest
requests. Everything that happens is written down (`history`); all that is told afterwards (`report`) is computed from these
files, so it can be computed again. See docs/labs.md.
"""
