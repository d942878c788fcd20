#!/bin/busybox sh
# The guest's only program. It reads one command a line from its second serial port and answers
# there; every answer about data is given after that data was synced.
#
#   write FIRST COUNT KIB   files of random content         SYNCED n sha256     a line each
#   commit FIRST COUNT      4 KiB records, fsync after each  COMMITTED n sha256  a line each
#   remove FIRST COUNT      deletes files, discards          REMOVED n
#   delete FIRST COUNT      deletes files                    DELETED n
#   install                 the packages that are there      INSTALLED n
#   contents                Perl reads what they consist of  CONTENTS n sha256
#   purge                   removes them all, discards       PURGED
#   discard                 from now on with each deletion   -
#   record FIRST COUNT MODE  transactions of a database       RECORDED n token     a line each
#   audit                   reads the database              INTEGRITY, BALANCE, ENTRY n token
#   size                    looks at the disk                SIZE bytes
#   end KIB                 random content at its very end   END sha256
#   verify                  reads all files from the disk    VERIFIED good bad
#   off                     makes the disk clean, powers off
#
# A command ends with DONE, or with FAILED and the reason.

export PATH=/usr/sbin:/usr/bin:/sbin:/bin
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

delete_files() {
    number=$1
    end=$(($1 + $2))
    while [ "$number" -lt "$end" ]; do
        rm "/data/file-$number" || return 1
        grep -v "/data/file-$number\$" /data/SHA256SUMS >/data/SHA256SUMS.new
        mv /data/SHA256SUMS.new /data/SHA256SUMS || return 1
        number=$((number + 1))
    done
    sync
}

remove_files() {
    delete_files "$1" "$2" && fstrim / || return 1
    echo "REMOVED $2"
}

# dpkg syncs each file before it gives it its name. What the guest has of itself is in no package. The
# shell would take an applet of its own for a program that is named without its path.
install_packages() {
    touch /var/lib/dpkg/status
    /usr/bin/dpkg --install --force-depends /packages/*.deb >/dev/console 2>&1 || return 1
    sync
    echo "INSTALLED $(grep -c '^Status: install ok installed$' /var/lib/dpkg/status)"
}

# With the Perl that was installed, and a library of it.
digest_contents() {
    sync
    echo 3 >/proc/sys/vm/drop_caches
    cat /var/lib/dpkg/info/*.list | /usr/bin/perl -MDigest::SHA -ne '
        chomp; $seen{$_} = 1 if -f and not -l;
        END {
            for my $path (sort keys %seen) {
                my $sum = Digest::SHA->new(256)->addfile($path, "b")->hexdigest;
                $all .= "$path $sum\n";
            }
            printf "CONTENTS %d %s\n", scalar(keys %seen), Digest::SHA::sha256_hex($all);
        }'
}

purge_packages() {
    names=$(sed -n 's/^Package: //p' /var/lib/dpkg/status)
    /usr/bin/dpkg --purge --force-depends --force-remove-essential --force-remove-protected \
        $names >/dev/console 2>&1 || return 1
    sync
    fstrim / || return 1
    echo PURGED
}

# Each transaction moves money between two accounts and notes a token, which is told once it is
# committed. sqlite3 prints a line when it has one, since its output is a terminal. With less than
# EXTRA the removal of a journal, which is the commit, may be undone by a power cut.
record_entries() {
    number=$1
    end=$(($1 + $2))
    {
        echo ".bail on"
        echo "PRAGMA journal_mode=$3;"
        echo "PRAGMA synchronous=EXTRA;"
        echo "CREATE TABLE IF NOT EXISTS accounts(id INTEGER PRIMARY KEY, balance INTEGER);"
        echo "CREATE TABLE IF NOT EXISTS entries(number INTEGER PRIMARY KEY, token, filler);"
        echo "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i+1 FROM n WHERE i<9)"
        echo "INSERT OR IGNORE INTO accounts SELECT i, 100 FROM n;"
        while [ "$number" -lt "$end" ]; do
            echo "BEGIN;"
            echo "UPDATE accounts SET balance=balance-1 WHERE id=$number%10;"
            echo "INSERT INTO entries VALUES($number, hex(randomblob(16)), randomblob(3000));"
            echo "UPDATE accounts SET balance=balance+1 WHERE id=($number*7+3)%10;"
            echo "COMMIT;"
            echo "SELECT 'RECORDED $number '||token FROM entries WHERE number=$number;"
            number=$((number + 1))
        done
    } | sqlite3 -batch /data/ledger.db
}

audit_entries() {
    sqlite3 -batch /data/ledger.db "
        SELECT 'INTEGRITY '||integrity_check FROM pragma_integrity_check;
        SELECT 'BALANCE '||sum(balance) FROM accounts;
        SELECT 'ENTRY '||number||' '||token FROM entries;"
}

disk_kib() {
    echo $(($(cat /sys/block/vda/size) / 2))
}

write_end() {
    dd if=/dev/urandom of=/tmp/end bs=1k count="$1" status=none || return 1
    dd if=/tmp/end of=/dev/vda bs=1k seek=$(($(disk_kib) - $1)) conv=notrunc,fsync status=none || return 1
    echo "END $(sum_of /tmp/end)"
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
        delete) delete_files "$first" "$second" && echo "DELETED $second" ;;
        install) install_packages ;;
        contents) digest_contents ;;
        purge) purge_packages ;;
        discard) mount -o remount,discard / ;;
        record) record_entries "$first" "$second" "$third" ;;
        audit) audit_entries ;;
        size) echo "SIZE $(($(disk_kib) * 1024))" ;;
        end) write_end "$first" ;;
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
