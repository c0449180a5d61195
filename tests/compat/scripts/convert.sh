# Every option of convert, those that contradict each other, and what becomes of the output.
qemu-img create -q -f qcow2 disk.q 8M
qemu-io -c 'write -q -P 1 0 1M' -c 'write -q -P 2 4M 64k' -c 'write -q -z 5M 64k' disk.q
qemu-img create -q part.raw 1M
qemu-io -f raw -c 'write -q -P 9 0 64k' part.raw
for options in '-O raw' '-O qcow2' '-O raw -S 0' '-O qcow2 -S 64k' '-O qcow2 -m 1' '-O raw -m 16 -W' '-O raw -C' \
    '-O raw -t none -T none' '-O raw -r 1G' '-O qcow2 -c' '-O qcow2 -c -o compression_type=zstd' '-O raw --salvage' '-U -O raw' \
    '-O qcow2 -o preallocation=metadata' '-O raw -o preallocation=full' '-O qcow2 -o preallocation=falloc' \
    '-O qcow2 -o compat=0.10 -o cluster_size=4k' '-O qcow2 -o extended_l2=on' '-O qcow2 -o lazy_refcounts' '-O raw -o nocow=on'; do
    rm -f out
    echo "== $options"
    qemu-img convert $options disk.q out && qemu-img map --output=json out
done
qemu-img convert -p disk.q out | tr '\r' '\n' | tail -1
qemu-img convert -p -q disk.q out
qemu-img convert -f raw -O qcow2 part.raw part.raw joined.q && qemu-img map --output=json joined.q
qemu-img convert -n -O qcow2 disk.q joined.q
qemu-img convert -n disk.q part.raw
qemu-img create -q -f qcow2 room.q 8M
qemu-img convert -n -O qcow2 disk.q room.q && qemu-img compare disk.q room.q
qemu-img convert -n --target-is-zero -O qcow2 disk.q room.q
qemu-img convert -n --target-image-opts disk.q driver=qcow2,file.filename=room.q
qemu-img convert --image-opts driver=qcow2,file.filename=disk.q out
for options in '--target-is-zero -O raw' '--target-image-opts' '-n -o size=1M' '-O qcow2 -o size=1M,nonsense=1' '-S 100' '-S 32M' \
    '-S x' '-m 0' '-m 17' '-m x' '-r x' '-C -S 4k' '-C -c -O qcow2' '-c' '-c -O qcow2 -o preallocation=full' '-C --salvage' \
    '-O nonsense' '-f nonsense' '-t nonsense' '-T nonsense' '-O qcow2 -F qcow2' '-B disk.q' '-l nonsense' '--nonsense' '-n' \
    '--bitmaps' '--skip-broken-bitmaps -O qcow2' '-O qcow2 -o help,' '-n --target-image-opts -O qcow2'; do
    rm -f out
    qemu-img convert $options disk.q out && echo "taken: $options"
done
qemu-img convert disk.q
qemu-img convert
qemu-img convert missing out
qemu-img convert disk.q nowhere/out
qemu-img convert disk.q disk.q
qemu-img convert -O qcow2 -o help | grep -c '=<'
qemu-img convert -O qcow2 -o cluster_size=4k,help disk.q out | head -1
rm -f out nowhere
