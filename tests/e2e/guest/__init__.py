"""A real Linux guest, built on the spot and driven from the host.

`kernel` fetches Debian's cloud kernel and a static busybox without installing them, `disk` makes
an ext4 root disk without mounting anything, `machine` runs QEMU on an NBD URI and speaks the line
protocol of the guest's init (`init.sh`), and `evidence` judges the disk afterwards. Nothing here
needs root, and nothing is kept outside the cache and the directories given.
"""
