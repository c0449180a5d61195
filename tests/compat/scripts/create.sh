# What new images can be given, and what is refused.
make() { rm -f new data.raw; qemu-img create "$@" && qemu-img info new; }
qemu-img create -q -f qcow2 base.q 8M
make -f qcow2 new 1M
make -f qcow2 new 1.5M
make -f qcow2 new 0
make -f qcow2 -o size=2M new
make -f qcow2 -o cluster_size=2M,lazy_refcounts=on,refcount_bits=64 new 10G
make -f qcow2 -o compat=0.10 -o cluster_size=4k new 1M
make -f qcow2 -o preallocation=metadata new 1M
make -f qcow2 -o extended_l2=on,compression_type=zstd new 1M
make -f qcow2 -o data_file=data.raw,data_file_raw=on new 1M
make -f qcow2 -o nolazy_refcounts,extended_l2 new 1M
make -f qcow2 -o nocow=on,extent_size_hint=1M new 1M
make -f qcow2 -b base.q -F qcow2 new
make -f qcow2 -o backing_file=base.q,backing_fmt=qcow2 new 1G
make -f qcow2 -u -b gone.q -F qcow2 new 1M
make -f qcow2 -u -b gone.q -F vmdk new 1M
make -f raw new 1000
make new 1M -o preallocation=full
make -f qcow2 file:new 1M
for options in '' '1M' '1M 2M' 'new' 'new 1M 2M' 'new abc' 'new -- -1' 'new 8E' '-f nonsense new 1M' '-o size=1M new 2M' \
    '-f qcow2 -b base.q new 1M' '-f qcow2 -F qcow2 new 1M' '-f qcow2 -b gone.q -F qcow2 new' '-f qcow2 -u -b gone.q -F qcow2 new' \
    '-f qcow2 -b base.q -F raw new' '-f qcow2 -b base.q -F nonsense new' '-f qcow2 -b new -F qcow2 new 1M' '-b base.q -F qcow2 new 1M' \
    '-f qcow2 -o cluster_size=100 new 1M' '-f qcow2 -o cluster_size=4M new 1M' '-f qcow2 -o refcount_bits=3 new 1M' \
    '-f qcow2 -o compat=0.10,lazy_refcounts=on new 1M' '-f qcow2 -o compat=v9 new 1M' '-f qcow2 -o preallocation=no new 1M' \
    '-f qcow2 -o lazy_refcounts=maybe new 1M' '-f qcow2 -o nonsense=1 new 1M' '-f qcow2 -o , new 1M' '-f qcow2 -o compat=v3, new 1M' \
    '-f qcow2 -o data_file_raw=on new 1M' '-f qcow2 -o encryption=on new 1M' '-f qcow2 -o encrypt.format=no new 1M' \
    '-f qcow2 nowhere/new 1M' '-f qcow2 json:{} 1M' '--object secret,id=a -f qcow2 new 1M' '--object nonsense,id=a new 1M' \
    '--object secret,data=x new 1M' '-f raw -o preallocation=metadata new 1M' '-x new 1M'; do
    rm -f new 1M
    qemu-img create $options && echo "taken: $options"
done
rm -f new 1M data.raw
for words in '-f qcow2 -o help' '-f raw -o help' '-f raw -o help new' '-f qcow2 -o cluster_size=1k,help new 1M' '-f nonsense -o help'; do
    qemu-img create $words | sed 's/ - .*//'
done
qemu-img
qemu-img nonsense
