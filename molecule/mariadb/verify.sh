#!/usr/bin/env bash
# What a thief and an outage would find. Everything is judged from outside: files, a server that starts or does not.
set -euo pipefail
here=$1
hsm_tde="$here/bin/hsm-tde"
servers=$(dirname "$0")/files/servers.sh
fails=0

check() { # check WHAT COMMAND...
    local what=$1
    shift
    if "$@" >/dev/null 2>&1; then printf 'ok: %s\n' "$what"; else
        printf 'NOT OK: %s\n' "$what"
        fails=$((fails + 1))
    fi
}
sql() { # sql SERVER ARGUMENTS...
    local server=$1
    shift
    mariadb --no-defaults -NB -S "$here/$server/run/sock" "$@"
}
start() { bash "$servers" "$here" start "$1"; }
stop() { bash "$servers" "$here" stop "$1"; }
cannot() { ! "$@"; }
data() { sql "$1" -e "SET group_concat_max_len = 100000000; SELECT COUNT(*), MD5(GROUP_CONCAT(MD5(body) ORDER BY id)) FROM shop.fixed"; }
no_marker() { ! grep -rqa HSMTDEMARKER "$here/$1/data" "$here/$1/tmp"; }
caught_up() {
    for _ in $(seq 100); do
        [ "$(data replica 2>/dev/null)" = "$(data primary)" ] && return
        sleep 0.1
    done
    return 1
}
refuses() { # refuses PATTERN COMMAND...
    local pattern=$1 said
    shift
    said=$("$@" 2>&1) && return 1
    grep -q -- "$pattern" <<<"$said"
}

before=$(data primary)
check "the replica, with keys of its own, has what the primary has" caught_up
check "the tables are under a new key" test "$(sql primary -e "SELECT DISTINCT CURRENT_KEY_ID FROM information_schema.INNODB_TABLESPACES_ENCRYPTION WHERE NAME LIKE 'shop/%'")" = 4
sql primary -e "FLUSH BINARY LOGS; PURGE BINARY LOGS BEFORE NOW() + INTERVAL 1 DAY; FLUSH TABLES shop.orders FOR EXPORT"
check "no file of the primary holds the marker" no_marker primary
check "no file of the replica holds the marker" no_marker replica
check "no key rests beside the memory" cannot grep -rqaFf <(sed -n 's/^[0-9]*;//p' "$here/primary/keys/keys") "$here/state" "$here/primary/data" "$here/primary/include"

check "close is refused while the server runs" refuses runs "$hsm_tde" close primary
check "the server stops" stop primary
check "the keystore closes" "$hsm_tde" close primary
check "without its keys the server does not start" cannot start primary
check "at boot the keystore opens with the PIN that rests on the host" "$hsm_tde" open primary
check "then the server starts" start primary
check "the data is as it was" test "$before" = "$(data primary)"
kill -KILL "$(cat "$here/primary/run/pid")"
sleep 1
check "it starts after a crash" start primary
check "the data is as it was" test "$before" = "$(data primary)"
sql primary -e "INSERT INTO shop.fixed VALUES (100001, 'HSMTDEMARKER late')"
check "the replica goes on" caught_up
check "the journal is whole" "$hsm_tde" journal verify
[ "$fails" = 0 ]
