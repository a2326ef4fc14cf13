# The first process of the emulated machine, in namespaces of mounts and processes of its own: becomes its ssh server.
# usage: bash serve.sh CACHE, as emulated_arm.sh start does
set -euo pipefail
cache=$1

# The server wants a root folder that nobody else can write to, all the way up: /mnt is one, wherever the cache lies.
mount --bind "$cache/root" /mnt
mount -t proc proc /mnt/proc
mount --rbind /sys /mnt/sys
mount --rbind /dev /mnt/dev
mount --bind "$cache/passwd" /etc/passwd
mount --bind "$cache/shadow" /etc/shadow
mkdir -p /run/sshd
exec /usr/sbin/sshd -D -e -f "$cache/sshd_config"
