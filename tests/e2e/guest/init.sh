#!/bin/sh
# The guest's only program. It reads one command a line from its second serial port and answers
# there; every answer about data is given after that data was synced.
#
#   write FIRST COUNT KIB   files of random content         SYNCED n sha256     a line each
#   commit FIRST COUNT      4 KiB records, fsync after each  COMMITTED n sha256  a line each
#   remove FIRST COUNT      deletes files, discards          REMOVED n
#   verify                  reads all files from the disk    VERIFIED good bad
#   off                     makes the disk clean, powers off
#
# A command ends with DONE, or with FAILED and the reason.

export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -o remount,rw /
exec </dev/ttyS1 >/dev/ttyS1 2>/dev/console
stty -F /dev/ttyS1 raw -echo

sum_of() {
    sha256sum "$1" | cut -d ' ' -f 1
}

write_files() {
    number=$1
    end=$(($1 + $2))
    while [ "$number" -lt "$end" ]; do
        file=/data/file-$number
        dd if=/dev/urandom of="$file" bs=1k count="$3" status=none || return 1
        sum=$(sum_of "$file")
        echo "$sum  $file" >>/data/SHA256SUMS || return 1
        sync
        # A sync after a failed write says nothing; reading what ext4 thinks of itself does.
        grep -q ' / ext4 rw' /proc/mounts || return 1
        echo "SYNCED $number $sum"
        number=$((number + 1))
    done
}

commit_records() {
    number=$1
    end=$(($1 + $2))
    while [ "$number" -lt "$end" ]; do
        dd if=/dev/urandom of=/tmp/record bs=4k count=1 status=none || return 1
        sum=$(sum_of /tmp/record)
        dd if=/tmp/record of=/journal/records bs=4k seek="$number" conv=notrunc,fsync status=none || return 1
        echo "COMMITTED $number $sum"
        number=$((number + 1))
    done
}

remove_files() {
    number=$1
    end=$(($1 + $2))
    while [ "$number" -lt "$end" ]; do
        rm "/data/file-$number" || return 1
        grep -v "/data/file-$number\$" /data/SHA256SUMS >/data/SHA256SUMS.new
        mv /data/SHA256SUMS.new /data/SHA256SUMS || return 1
        number=$((number + 1))
    done
    sync
    fstrim / || return 1
    echo "REMOVED $2"
}

verify_files() {
    [ -f /data/SHA256SUMS ] || touch /data/SHA256SUMS
    sync
    echo 3 >/proc/sys/vm/drop_caches
    sha256sum -c /data/SHA256SUMS >/tmp/verdict
    good=$(grep -c ': OK$' /tmp/verdict)
    all=$(wc -l </data/SHA256SUMS)
    echo "VERIFIED $good $((all - good))"
}

mount -t tmpfs tmp /tmp
echo "READY $(uname -r)"
while read -r command first second third; do
    case $command in
        write) write_files "$first" "$second" "$third" ;;
        commit) commit_records "$first" "$second" ;;
        remove) remove_files "$first" "$second" ;;
        verify) verify_files ;;
        off)
            umount /tmp
            sync
            mount -o remount,ro / && echo DONE || echo FAILED remount
            poweroff -f
            ;;
        *) false ;;
    esac && echo DONE || echo "FAILED $command"
done
