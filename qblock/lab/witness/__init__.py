"""The witness experiment: does the byte tell a restarted management where the guest's last write is?

Models the protocol of drive-reopen's witness (rfc-2012.md): management notes that it is about to switch a guest to the mirror,
sends a descriptor along, and the machine writes one byte to it between opening the new image and letting the guest go on. Here
the machine and its management are processes of their own. Each is killed, alone or with the other, at every step that either of
them takes; then whoever is left, or a management started anew, decides which image the guest goes on with, and the images are
searched for every write that the guest had flushed.

From the ground up: `disk` (what the guest writes, and what an image holds of it), `processes` (children, killed for good),
`machine` and `management` (the two), `case` (one kill), `verdict` (what the files say), `experiment` (all cases, and pairs of
cases that nobody can tell apart), `report` (as text and JSON).
"""
