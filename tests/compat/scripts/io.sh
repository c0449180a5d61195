# qemu-io: all commands, with their options and their mistakes.
qemu-img create -q -f qcow2 base.q 8M
qemu-io -c 'write -q -P 1 0 1M' -c 'write -q -P 2 4M 64k' base.q
qemu-img create -q -f qcow2 -b base.q -F qcow2 disk.q
printf abc > text
qemu-io -c 'write -P 3 512k 64k' -c 'read -P 3 512k 64k' -c 'read -P 1 512k 64k' -c 'read -v 512k 40' -c 'write -s text 0 16' -c 'read -v 0 16' \
    -c 'read -P 3 -s 512 -l 512 512k 4k' -c 'writev 1M 4k 8k' -c 'readv -P 0xcd 1M 4k 8k' -c 'write -C 0 1k' -c 'read -C 0 1k' -c 'write -f 0 512' \
    -c 'write -z 2M 64k' -c 'write -zu 3M 64k' -c 'write -zn 3M 64k' -c 'write -c 5M 64k' -c 'read -P 0xcd 5M 64k' -c 'write -p 0 1k' -c 'discard 0 64k' \
    -c 'discard -C 0 64k' -c flush -c length -c 'alloc 0' -c 'alloc 0 8M' -c 'alloc 7M 4M' -c map -c info -c 'sleep 1' -c 'truncate 9M' -c length \
    -c 'truncate -m metadata 10M' -c 'truncate -m no 11M' disk.q
qemu-io -c 'read' -c 'read 0' -c 'read -x 0 1' -c 'read a 1' -c 'read 0 -1' -c 'read 0 3G' -c 'write -P 300 0 1' -c 'write -u 0 1' -c 'write -n 0 1' \
    -c 'write -z -P 1 0 1' -c 'write -c -f 0 64k' -c 'write -b -z 0 512' -c 'write -s missing 0 1' -c 'read -s 1 0 1' -c 'read -P 1 -s 2 -l 2 0 3' \
    -c 'read 99M 1' -c 'write 99M 1' -c nonsense -c 'length 1' -c 'sleep x' -c 'alloc' -c 'truncate x' -c 'help nonsense' -c open -c 'aio_write -z 0 1 1' disk.q
qemu-io -c 'aio_write -P 5 0 64k' -c aio_flush -c 'aio_read -P 5 0 64k' -c aio_flush -c 'aio_read -P 6 0 64k' -c aio_flush -c 'aio_read -C 0 1k' -c aio_flush \
    -c 'aio_write -f 0 1k' -c aio_flush -c 'aio_write -q 0 1k' -c aio_flush -c 'aio_read -i 0 1k' -c 'aio_write -i 0 1k' -c 'aio_read 99M 1k' -c aio_flush disk.q
qemu-io -c 'write -b -P 5 0 64k' -c 'read -b -P 5 0 64k' -c 'read -b -P 0 1G 512' -c 'write -b 100 512' -c 'read -b 0 100' disk.q
qemu-io -f raw -c 'write -b 0 512' -c 'read -b 0 512' -c info text
qemu-io -c 'reopen -r' -c 'write 0 1k' -c 'reopen -w' -c 'write -P 7 0 1k' -c 'reopen -c none' -c 'read -P 7 0 1k' -c 'reopen -c writethrough' \
    -c 'reopen -o lazy-refcounts=on' -c 'reopen -o discard=off' -c 'write -P 8 0 1k' -c reopen -c 'reopen x' -c 'reopen -x' -c 'reopen -c no' \
    -c 'reopen -r -w' -c 'reopen -o driver=raw' -c 'reopen -o nonsense=on' -c 'reopen -r -o read-only=on' -c 'reopen -c none -o cache.direct=on' \
    -c 'reopen -o read-only=on' -c 'read -P 8 0 1k' disk.q
qemu-io -c 'break write_aio A' -c 'aio_write -P 9 0 64k' -c 'wait_break A' -c 'read -P 8 0 1k' -c 'resume A' -c aio_flush -c 'read -P 9 0 64k' \
    -c 'break no A' -c 'resume A' -c 'remove_break A' -c 'break write_aio B' -c 'remove_break B' -c 'write 0 1k' -c break -c 'resume' blkdebug::disk.q
qemu-io -c 'break write_aio A' disk.q
for signal in 0 1 15 x 999; do qemu-io -c "sigraise $signal" -c length disk.q; done
qemu-io -c 'write -q 0 1k' -c abort -c length disk.q
qemu-io -c length -c quit -c nonsense disk.q
qemu-io -c help | wc -l
printf 'length\nnonsense\nread 0 64k\n\n  length  \nquit\nlength\n' | qemu-io disk.q
printf 'length\nopen disk.q\nlength\nopen base.q\nclose\nclose\nopen -r base.q\nwrite 0 1\nread 0 1k\nclose\nopen missing\nopen -x base.q\nq\n' | qemu-io
printf 'open -o driver=qcow2 disk.q\nlength\nclose\nopen -o driver=qcow2,file.filename=disk.q\nlength\nclose\nopen -o nonsense disk.q\n' | qemu-io
printf 'open -s disk.q\nwrite -P 4 0 64k\nread -P 4 0 64k\nclose\nopen disk.q\nread -P 4 0 64k\n' | qemu-io
printf 'open -t none -d unmap disk.q\nlength\nclose\nopen -t no disk.q\nopen -d no disk.q\nopen -U disk.q\nopen -rU disk.q\nlength' | qemu-io
for options in '-r' '-s' '-s -r' '-n' '-m' '-n -m' '-C' '-C -r' '-d off' '-d no' '-t directsync' '-t no' '-U' '-U -r' '-i threads' '-i no' '-f raw' '-f no' \
    '--image-opts' '--image-opts -f qcow2' '--object secret,id=a,data=b' '--object secret,id=a' '-x'; do
    echo "== $options"
    qemu-io $options -c 'read -P 1 64k 64k' -c 'write -q -P 1 64k 64k' -c 'read 0 1k' base.q >out
    echo "$?"
    grep -v -e ' ops; ' -e '^$' -e '^ ' -e sage -e '^See' -e '^QEMU' -e '^Reads' -e "^'" -e '^More' out
done
qemu-io -c 'read 0 1' disk.q base.q > /dev/null
qemu-io -c 'read 0 1' missing
qemu-io -c 'read 0 1'
