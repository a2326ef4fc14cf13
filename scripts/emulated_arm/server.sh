# Sourced by emulated_arm.sh: the ssh server, and what lets this kernel start programs for ARM.

FIRST_PORT=2222
BINFMT=/proc/sys/fs/binfmt_misc
ENTRY=espalier-$(cksum <<<"$cache" | cut -d' ' -f1) # each cache has its own, and its end is nobody else's

# is_running: whether the process that the cache names is the server of this cache.
is_running() {
    local words=()
    [[ -s "$cache/pid" && -s "$cache/port" ]] || return 1
    # A number may belong to another process by now; the same cache may have been started from another checkout.
    mapfile -d '' -t words 2>/dev/null <"/proc/$(<"$cache/pid")/cmdline" || return 1
    [[ ${#words[@]} -gt 2 && "${words[-2]}" == */emulated_arm/serve.sh && "${words[-1]}" == "$cache" ]]
}

# answers: whether a command can be run on the emulated machine.
answers() {
    [[ "$(timeout 30 ssh -F "$cache/ssh_config" "$name" uname -m 2>"$cache/ssh.log" </dev/null)" == aarch64 ]]
}

# start PORT: PORT may be empty.
start() {
    local port=$1 tries
    port=$(free_port "$port") || exit 2
    configure "$port"
    : >"$cache/server.log"
    # The number of the process that becomes the server is on disk before that is one.
    # shellcheck disable=SC2016  # for the other shell
    setsid bash -c 'echo $$ >"$1/pid" && exec unshare --mount --pid --fork --kill-child bash "$2" "$1"' \
        bash "$cache" "$here/serve.sh" </dev/null >>"$cache/server.log" 2>&1 9>&- &
    for tries in {1..40}; do
        sleep 0.25
        ! { is_running && answers; } || return 0
        [[ "$tries" -lt 8 ]] || is_running || break
    done
    tail -n 5 "$cache/server.log" "$cache/ssh.log" >&2
    stop
    fail "the server of the emulated machine does not answer: the lines above say why"
}

# stop: end the server and every process on the emulated machine, if there are any.
stop() {
    local pid children child tries
    is_running || { rm -f "$cache/pid" "$cache/port"; return 0; }
    pid=$(<"$cache/pid")
    children=$(pgrep -P "$pid" || true)
    # Its child is the first process of a namespace: the kernel ends that one with it, and the rest with that one.
    kill -KILL "$pid"
    for child in $pid $children; do
        for tries in {1..100}; do
            [[ -e "/proc/$child" ]] || break
            sleep 0.1
        done
    done
    rm -f "$cache/pid" "$cache/port"
}

# free_port PORT: print it if nothing listens there; when it is empty, the first that is free.
free_port() {
    local port
    for port in ${1:-$(seq "$FIRST_PORT" "$((FIRST_PORT + 20))")}; do
        # shellcheck disable=SC2188
        if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
            echo "$port"
            return
        fi
    done
    fail "${1:+port $1 is taken: }give a free one with --port"
}

# configure PORT: keys and settings of the server and of its clients, below the cache.
configure() {
    local port=$1 key
    for key in host_key client_key; do
        [[ -e "$cache/$key" ]] || ssh-keygen -q -t ed25519 -N "" -C "$name" -f "$cache/$key"
    done
    mkdir -p "$root/root/.ssh"
    cp "$cache/client_key.pub" "$root/root/.ssh/authorized_keys"
    echo "[127.0.0.1]:$port $(cut -d' ' -f1,2 "$cache/host_key.pub")" >"$cache/known_hosts"
    # What the server takes for this machine's users: here root may be locked, or like another shell.
    printf '%s\n' "root:x:0:0:root:/root:/bin/bash" "sshd:x:65534:65534::/run/sshd:/usr/sbin/nologin" >"$cache/passwd"
    printf '%s\n' "root:*:19000:0:99999:7:::" "sshd:*:19000:0:99999:7:::" >"$cache/shadow"
    cat >"$cache/sshd_config" <<CONFIG
ListenAddress 127.0.0.1
Port $port
HostKey "$cache/host_key"
PidFile none
ChrootDirectory /mnt
AuthorizedKeysFile /mnt/root/.ssh/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
AllowTcpForwarding no
UsePAM no
PrintMotd no
PrintLastLog no
Subsystem sftp internal-sftp
SetEnv OMP_WAIT_POLICY=passive QEMU_CPU=cortex-a76
CONFIG
    cat >"$cache/ssh_config" <<CONFIG
Host $name
    HostName 127.0.0.1
    Port $port
    User root
    IdentityFile "$cache/client_key"
    IdentitiesOnly yes
    UserKnownHostsFile "$cache/known_hosts"
    StrictHostKeyChecking yes
CONFIG
    echo "$port" >"$cache/port"
}

# enable_emulation: let the kernel start programs for ARM through qemu, wherever they lie.
enable_emulation() {
    local magic mask
    # What the system itself has registered is used, what another cache has may end with that one.
    compgen -G "$BINFMT/espalier-*" >/dev/null || ! chroot "$root" /bin/true 2>/dev/null || return 0
    if [[ ! -e "$BINFMT/register" ]]; then
        mount -t binfmt_misc binfmt_misc "$BINFMT" 2>/dev/null ||
            fail "this kernel cannot start programs for ARM: its binfmt_misc is missing or may not be mounted here (on the machine that owns the kernel: modprobe binfmt_misc; in a container: --privileged)"
        cp /proc/sys/kernel/random/boot_id "$cache/mounted_binfmt"
    fi
    # An ELF file of 64 bits, little endian, of any OS, that can be executed, for machine 183.
    magic='\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00'
    mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'
    [[ ! -e "$BINFMT/$ENTRY" ]] || echo -1 >"$BINFMT/$ENTRY"
    # F: qemu is opened now, so that it is found in every root.
    printf '%s' ":$ENTRY:M::$magic:$mask:$(command -v qemu-aarch64-static):F" >"$BINFMT/register" 2>/dev/null ||
        fail "this kernel lets nobody register programs for ARM here (in a container: --privileged)"
    chroot "$root" /bin/true || fail "programs for ARM cannot be started through qemu-aarch64-static"
}

# disable_emulation: undo what enable_emulation did.
disable_emulation() {
    [[ ! -e "$BINFMT/$ENTRY" ]] || echo -1 >"$BINFMT/$ENTRY"
    # After a restart of the machine it is another one's mount.
    if cmp -s "$cache/mounted_binfmt" /proc/sys/kernel/random/boot_id && ! compgen -G "$BINFMT/espalier-*" >/dev/null; then
        umount "$BINFMT" 2>/dev/null || true
    fi
    rm -f "$cache/mounted_binfmt"
}
