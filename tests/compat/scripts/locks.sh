# An image that another program has open: real ones hold it against these tools, and these against real ones.
hold() { # hold PROGRAM [OPTIONS]: open top.q until release
    rm -f pipe held; touch held; mkfifo pipe
    "$@" top.q <pipe >held &
    exec 7>pipe
    until grep -q MiB held; do echo length >&7; sleep 0.05; done
}
release() { echo quit >&7; exec 7>&-; wait; }
qemu-img create -q -f qcow2 base.q 8M
qemu-img create -q -f qcow2 -b base.q -F qcow2 top.q
hold /usr/bin/qemu-io
for words in 'info top.q' 'info -U top.q' 'check top.q' 'check -U top.q' 'map top.q' 'map -U top.q' 'compare top.q base.q' 'compare -U top.q base.q' \
    'convert top.q out' 'convert -U top.q out' 'info base.q' 'resize base.q +1M' 'snapshot -l top.q' 'snapshot -l -U top.q' 'snapshot -c x top.q' \
    'amend -o compat=v3 top.q' 'rebase -u -b base.q -F qcow2 top.q' 'commit top.q' 'bitmap --add top.q b' 'create -f qcow2 top.q 1M' \
    'create -f raw base.q 1M' 'bench -c 1 -w top.q' 'bench -c 1 -U top.q'; do
    qemu-img $words > /dev/null
done
qemu-io -r -c length top.q
qemu-io -r -U -c length top.q
qemu-io -c length base.q
release
rm -f out
for options in '' -r; do
    hold qemu-io $options
    /usr/bin/qemu-img info top.q >/dev/null; echo $?
    /usr/bin/qemu-img resize base.q +1M; echo $?
    /usr/bin/qemu-io -c length base.q; echo $?
    /usr/bin/qemu-io -r -c length base.q; echo $?
    release
done
rm -f pipe held
