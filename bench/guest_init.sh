#!/bin/busybox sh
# The measured guest's only program: runs fio on its disk, once for each line of its second serial
# port, which are fio's arguments. Answers there with what fio says and a line END with its status.
# A line `off` ends the guest.

/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t tmpfs tmp /tmp
for module in $(/bin/busybox cat /modules/order); do /bin/busybox insmod /modules/"$module"; done
tries=0
while [ ! -b /dev/vda ] && [ $tries -lt 100 ]; do /bin/busybox sleep 0.1; tries=$((tries + 1)); done
exec </dev/ttyS1 >/dev/ttyS1 2>&1
/bin/busybox stty -F /dev/ttyS1 raw -echo
cd /tmp || exit 1
echo "READY $(/bin/busybox uname -r)"
while read -r line; do
    [ "$line" != off ] || /bin/busybox poweroff -f
    # shellcheck disable=SC2086 # a word is an argument
    fio --filename=/dev/vda --ioengine=libaio --direct=1 --thread --output-format=json $line
    echo "END $?"
done
