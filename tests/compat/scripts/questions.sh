# info, map, check, compare, measure: asked in all ways.
qemu-img create -q -f qcow2 base.q 8M
qemu-io -c 'write -q -P 1 0 1M' -c 'write -q -P 2 4M 64k' base.q
qemu-img create -q -f qcow2 -b base.q -F qcow2 top.q
qemu-io -c 'write -q -P 3 512k 64k' top.q
qemu-img create -q plain.raw 1M
qemu-img convert -c -O qcow2 top.q packed.q
for words in top.q '-f raw top.q' '-f qcow2 plain.raw' '--output=json top.q' '--output=no top.q' '-U plain.raw' '' 'top.q base.q' missing \
    '-f nonsense top.q' '--image-opts driver=qcow2,file.filename=top.q' '--image-opts file.filename=top.q' '--image-opts filename=top.q' \
    '--image-opts -f qcow2 driver=qcow2,file.filename=top.q' '--image-opts nonsense' '. ' 'nope:foo' 'json:{' 'json:{"driver":"raw"}' \
    'json:{"driver":"raw","offset":65536,"file":{"driver":"file","filename":"top.q"}}' '--object secret,id=a,data=b top.q' '-q top.q'; do
    echo "== info $words"
    qemu-img info $words
done
for words in top.q packed.q plain.raw '--output json packed.q' '-s 512k -l 1M top.q' '--output=json -s 520k -l 100 top.q' '-s -1 top.q' \
    '-l x top.q' '--output=json -l 0 top.q' '-f raw top.q' '-U top.q' '--image-opts -f qcow2 driver=qcow2,file.filename=top.q'; do
    echo "== map $words"
    qemu-img map $words
done
for words in top.q '--output=json top.q' plain.raw '--output=json plain.raw' '-q top.q' '-q --output=json top.q' '-r leaks top.q' '-r all top.q' '-r no top.q' \
    '-T none top.q' '-T no top.q' '-U top.q' '-f raw top.q' '--image-opts driver=qcow2,file.filename=top.q' missing ''; do
    echo "== check $words"
    qemu-img check $words
done
for words in 'top.q packed.q' 'top.q base.q' '-s top.q packed.q' '-q top.q base.q' 'top.q plain.raw' '-s top.q plain.raw' 'top.q missing' \
    '-f raw -F raw top.q plain.raw' '-f no top.q packed.q' '-T no top.q packed.q' 'top.q' '-U top.q packed.q' \
    '--image-opts driver=qcow2,file.filename=top.q driver=qcow2,file.filename=packed.q' '-F qcow2 --image-opts a b'; do
    echo "== compare $words"
    qemu-img compare $words
done
qemu-img compare -p top.q packed.q | tr '\r' '\n' | tail -2
for words in top.q '-O qcow2 top.q' '--output=json -O qcow2 top.q' '--size 1G -O qcow2' '--size 1G top.q' '' '--size x' '-O no --size 1G' \
    '-O qcow2 -o cluster_size=2M,preallocation=full --size 10G' '-O qcow2 -o nonsense=1 --size 1G' '-O qcow2 -o refcount_bits=1 --size 10G' \
    '-O qcow2 -o extended_l2=on --size 10G' '-l no -O qcow2 top.q' '-U -O qcow2 top.q' '-f raw -O qcow2 top.q'; do
    echo "== measure $words"
    qemu-img measure $words
done
