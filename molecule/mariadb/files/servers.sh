#!/usr/bin/env bash
# The scenario's servers: servers.sh FOLDER prepare | start NAME | stop NAME. Prints what it changed.
set -euo pipefail
here=$1

answers() { mariadb-admin -S "$here/$1/run/sock" ping >/dev/null 2>&1; }

prepare() {
    local name port
    [ ! -e "$here/prepared" ] || return 0
    install -d -m 755 "$here" "$here/bin"
    install -d -m 700 "$here/tokens" "$here/secrets"
    printf 'directories.tokendir = %s/tokens\nobjectstore.backend = file\nlog.level = ERROR\n' "$here" >"$here/softhsm2.conf"
    for name in primary replica; do
        port=$([ $name = primary ] && echo 54721 || echo 54722)
        install -d -m 755 "$here/$name" "$here/$name/include"
        install -d -m 755 -o mysql -g mysql "$here/$name/run" "$here/$name/tmp" "$here/$name/data"
        cat >"$here/$name/my.cnf" <<EOF
[mariadb]
datadir = $here/$name/data
socket = $here/$name/run/sock
pid_file = $here/$name/run/pid
log_error = $here/$name/run/log.err
tmpdir = $here/$name/tmp
bind_address = 127.0.0.1
port = $port
server_id = $port
log_bin = bin
innodb_buffer_pool_size = 32M
innodb_log_file_size = 8M
innodb_encryption_rotation_iops = 2000
!includedir $here/$name/include
EOF
        mariadb-install-db "--defaults-file=$here/$name/my.cnf" --user=mysql --auth-root-authentication-method=socket --skip-test-db >/dev/null
    done
    touch "$here/prepared"
    echo prepared
}

start() {
    answers "$1" && return
    # The socket of a server that was killed is still there.
    rm -f "$here/$1/run/sock"
    (cd / && exec setsid setpriv --reuid=mysql --regid=mysql --init-groups \
        mariadbd "--defaults-file=$here/$1/my.cnf" </dev/null >/dev/null 2>&1) &
    local pid=$!
    for _ in $(seq 200); do
        if answers "$1"; then
            echo "started $1"
            return
        fi
        [ -e "/proc/$pid" ] || break
        sleep 0.1
    done
    tail -20 "$here/$1/run/log.err"
    return 1
}

stop() {
    local pid
    pid=$(cat "$here/$1/run/pid")
    mariadb-admin -S "$here/$1/run/sock" shutdown
    while [ -e "/proc/$pid" ]; do sleep 0.1; done
    echo "stopped $1"
}

"${@:2}"
