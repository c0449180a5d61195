# Layers: built, moved to other backing files, flattened.
qemu-img create -q -f qcow2 base.q 8M
qemu-io -c 'write -q -P 1 0 1M' -c 'write -q -P 2 4M 64k' base.q
qemu-img create -q -f qcow2 -b base.q -F qcow2 mid.q
qemu-io -c 'write -q -P 4 2M 64k' mid.q
qemu-img create -q -f qcow2 -b mid.q -F qcow2 top.q 12M
qemu-io -c 'write -q -P 3 512k 64k' -c 'write -q -P 5 11M 64k' top.q
qemu-img info --backing-chain top.q
qemu-img info --backing-chain --output=json top.q | python3 -c 'import json, sys
for image in json.load(sys.stdin): print(image["filename"], image.get("full-backing-filename"), sorted(image))'
qemu-img info -U top.q | head -3
qemu-img info --image-opts driver=qcow2,file.driver=file,file.filename=top.q | head -2
qemu-img map --output=json --start-offset=512k --max-length=2M top.q
qemu-img map --output=json --start-offset=12M top.q
qemu-img map -s 99M top.q
qemu-img rebase -b base.q -F qcow2 top.q
qemu-img map --output=json top.q
qemu-img rebase -p -b mid.q -F qcow2 top.q | tr '\r' '\n' | tail -1
qemu-img rebase -u -b gone.q -F qcow2 top.q
qemu-img map top.q
qemu-img info top.q | grep backing
qemu-img rebase -b mid.q -F qcow2 top.q
qemu-img rebase -u -b mid.q -F qcow2 top.q
qemu-img rebase -b base.q top.q
qemu-img rebase -b base.q -F nonsense top.q
qemu-img rebase -f raw -b base.q -F qcow2 top.q
qemu-img rebase top.q
qemu-img rebase -b top.q -F qcow2 top.q
qemu-img convert -O qcow2 -B base.q -F qcow2 top.q over.q && qemu-img info over.q | grep backing
qemu-img convert -O qcow2 -B base.q top.q other.q
qemu-img convert -O qcow2 -B gone.q -F qcow2 top.q other.q
qemu-img convert -O qcow2 -B base.q -F qcow2 top.q top.q other.q
rm -f other.q
qemu-img commit top.q
qemu-img commit -b base.q top.q
qemu-img commit -b gone.q top.q
qemu-img commit -p top.q | tr '\r' '\n' | tail -2
qemu-img commit base.q
qemu-img commit -t nonsense top.q
qemu-img commit -r x top.q
qemu-img rebase -b '' top.q
qemu-img info top.q | grep -c backing
qemu-io -r -c 'read -P 3 512k 64k' -c 'read -P 5 11M 64k' -c 'read -P 2 4M 64k' -c map top.q
qemu-img check top.q
