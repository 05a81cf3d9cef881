#!/bin/busybox sh
# The first program in a machine: makes the host's root its own and hands over to the agent.
#
# In /paths it finds, as the host has them and as they will be inside:
#   modules   the folder of this kernel's modules
#   shared    the one folder that both the host and the machines write
#   python    the interpreter that runs
#   agent     this program

export PATH=/bin
/bin/busybox --install -s /bin

stop() {
    echo "init: $*, giving up"
    poweroff -f
    exit 1
}

# shellcheck disable=SC1091  # written when the archive is made
. /paths

for module in /modules/*.ko; do
    insmod "$module" || stop "cannot load $module"
done

options=trans=virtio,version=9p2000.L,msize=512000
# Nobody changes programs while a machine runs them, so their pages may stay in its memory.
mount -t 9p -o "ro,cache=loose,$options" host /host || stop "cannot mount the host's root"
mount -t tmpfs -o size=75% layer /layer || stop "cannot mount the layer in memory"
mkdir /layer/upper /layer/work
mount -t overlay -o lowerdir=/host,upperdir=/layer/upper,workdir=/layer/work root /root || stop "cannot mount the root"

cd /root || stop "the root is empty"
for place in proc sys dev run; do
    [ -d $place ] || mkdir $place
done
mount -t proc proc proc
mount -t sysfs sys sys
mount -t devtmpfs dev dev
mkdir -p dev/pts dev/shm
mount -t devpts pts dev/pts
mount -t tmpfs -o mode=1777 shm dev/shm
mount -t tmpfs run run
mkdir -p run/lock run/netns

mkdir -p "./$shared"
mount -t 9p -o "rw,cache=none,$options" shared "./$shared" || stop "cannot mount $shared"

# The kernel itself calls modprobe for what it finds missing, and that looks nowhere else.
mkdir -p lib/modules
[ -e "lib/modules/$(uname -r)" ] || ln -s "$modules" lib/modules/

ip link set lo up
# Isolated and without site, it reads few files to start.
exec switch_root /root "$python" -I -S "$agent" || stop "cannot start $agent"
