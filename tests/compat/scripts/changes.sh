# resize, snapshot, bitmap and amend, one after the other on one image.
qemu-img create -q -f qcow2 disk.q 8M
qemu-img create -q plain.raw 1M
qemu-io -c 'write -q -P 1 0 1M' disk.q
for words in 'disk.q +1M' 'disk.q 10M' '-q disk.q 12M' 'disk.q -2M' '--shrink disk.q -2M' 'disk.q x' 'disk.q +0' '--shrink disk.q -100M' \
    '--preallocation=metadata disk.q 11M' '--preallocation=no disk.q 12M' '--preallocation=full --shrink disk.q 8M' 'disk.q' '' \
    '-f raw plain.raw 3M' '--preallocation=falloc -f raw plain.raw 4M' '-f raw --preallocation=metadata plain.raw 5M' 'missing 1M' \
    '--image-opts driver=qcow2,file.filename=disk.q 12M' '--image-opts -f qcow2 driver=qcow2,file.filename=disk.q 12M' '10M disk.q'; do
    echo "== resize $words"
    qemu-img resize $words
done
qemu-io -c length disk.q
for words in disk.q '-U disk.q' '-l disk.q' '-c one disk.q' '-c one disk.q' '-q -c two disk.q' '-a one disk.q' '-a no disk.q' '-d no disk.q' \
    '-d one disk.q' '-c x -d y disk.q' '-l plain.raw' '-c x plain.raw' '-f qcow2 -l disk.q' '-l' '-l --image-opts driver=qcow2,file.filename=disk.q' \
    '-U -l disk.q' '-a two disk.q' '-d one disk.q' '-d two disk.q' '-d two disk.q'; do
    echo "== snapshot $words"
    qemu-img snapshot $words
done
for words in '--add disk.q b0' '--add disk.q b0' '--add -g 4k --disable disk.q b1' '--add -g 100 disk.q b2' '-g 4k --remove disk.q b1' \
    '--enable disk.q b1' '--clear disk.q b1' '--merge b0 disk.q b1' '--merge no disk.q b1' '--remove disk.q no' 'disk.q b0' '--add disk.q' \
    '--add plain.raw b0' '--add -f qcow2 disk.q b5' '-F qcow2 --add disk.q b6' '-b plain.raw --add disk.q b6' '--add --remove disk.q b7'; do
    echo "== bitmap $words"
    qemu-img bitmap $words
done
qemu-img info disk.q
qemu-img convert --bitmaps -O qcow2 disk.q copy.q && qemu-img info --output=json copy.q | grep -c granularity
qemu-img convert --bitmaps -O raw disk.q copy.raw
rm -f copy.raw
for name in b0 b1 b5; do qemu-img bitmap --remove disk.q $name; done
for options in compat=0.10 compat=1.1 lazy_refcounts=on refcount_bits=8 refcount_bits=7 size=16M size=1M cluster_size=4k nonsense=1 \
    backing_file=no compat=v9 nolazy_refcounts compat=v3, ''; do
    echo "== amend $options"
    qemu-img amend -o "$options" disk.q
done
qemu-img amend -p -o compat=v2 disk.q | tr '\r' '\n' | tail -1
qemu-img amend disk.q
qemu-img amend -o compat=v3 plain.raw
qemu-img amend -o help disk.q | sed 's/ - .*//'
qemu-img amend -f raw -o help
qemu-img info disk.q
qemu-img check disk.q
for words in '-c 5 disk.q' '-c 5 -d 2 -s 512 -S 1024 -o 4k -q disk.q' '-c 5 -w --pattern=7 disk.q' '-c 5 -w --flush-interval=5 --no-drain disk.q' \
    '-c 5 --flush-interval=5 disk.q' '-c x disk.q' '-d x disk.q' '-c 5 -t no disk.q' '-c 5 -i no disk.q' '-c 5 --no-drain disk.q' '-c 5 -U -w disk.q' \
    '-c 5 --pattern=300 -w disk.q' '-f raw -c 5 plain.raw' '' missing; do
    echo "== bench $words"
    qemu-img bench $words
done
