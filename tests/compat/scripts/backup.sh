# A nightly backup of a disk: overlay, copy, check, commit, prune.
set -e
qemu-img create -f qcow2 disk.q 64M
qemu-io -c 'write -P 1 0 4M' -c 'write -P 2 40M 1M' disk.q
qemu-img create -f qcow2 -b disk.q -F qcow2 live.q
qemu-io -c 'write -P 3 2M 512k' -c 'write -z 40M 64k' -c 'discard 3M 64k' live.q
size=$(qemu-img info --output=json live.q | python3 -c 'import json, sys; print(json.load(sys.stdin)["virtual-size"])')
echo "the disk has $size bytes"
qemu-img measure -O qcow2 disk.q
qemu-img convert -c -O qcow2 disk.q backup.q
qemu-img compare disk.q backup.q
if qemu-img compare live.q backup.q; then echo "nothing to do"; else echo "changed ($?)"; fi
qemu-img check backup.q
qemu-img map live.q
qemu-img map --output=json live.q | python3 -c 'import json, sys
for area in json.load(sys.stdin): print(area["start"], area["length"], area["depth"], area["zero"], area["data"])'
qemu-img commit -d live.q
qemu-img compare -s live.q disk.q || echo "strictly different ($?)"
qemu-img compare live.q disk.q
qemu-img rebase -b backup.q -F qcow2 live.q
qemu-img info live.q | grep '^backing'
qemu-img rebase -u -b disk.q -F qcow2 live.q
qemu-img convert -O raw live.q flat.raw
qemu-img convert -n -O qcow2 live.q backup.q
qemu-img dd if=flat.raw of=head.raw bs=1M count=3 -f raw -O raw
qemu-img resize -f raw head.raw +1M
qemu-img info head.raw | sed -n 1,3p
for image in disk.q live.q backup.q; do qemu-img check -q $image && echo "$image is sound"; done
