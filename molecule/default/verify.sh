#!/usr/bin/env bash
# What a thief, an outage and a careless operator would find. Everything is judged from outside:
# raw images, directory listings, a server that starts or does not.
set -euo pipefail
here=$1
hsm_tde="$here/bin/hsm-tde"
bin=$(dirname "$(find /usr/lib/postgresql -name pg_ctl | sort | tail -1)")
scenario=$(cd "$(dirname "$0")" && pwd)
fails=0

say() { printf '%s\n' "$*"; }
check() { # check WHAT COMMAND...
    local what=$1
    shift
    if "$@" >/dev/null 2>&1; then say "ok: $what"; else
        say "NOT OK: $what"
        fails=$((fails + 1))
    fi
}
refuses() { # refuses EXIT_CODE PATTERN COMMAND...
    local code=$1 pattern=$2 said rc=0
    shift 2
    said=$("$@" 2>&1) || rc=$?
    [ "$rc" = "$code" ] && grep -q -- "$pattern" <<<"$said"
}
as_postgres() { setpriv --reuid=postgres --regid=postgres --init-groups "$@"; }
start() { # start NAME DATA PORT
    as_postgres "$bin/pg_ctl" start -w -t 30 -D "$2" -l "$here/log/$1.log" -o "-p $3 -k $here/run -c listen_addresses="
}
stop() { as_postgres "$bin/pg_ctl" stop -w -m "$2" -D "$1"; }
checksum() { as_postgres psql -XAtq -h "$here/run" -p "$1" -c "SELECT md5(string_agg(note, '' ORDER BY id)) FROM patients"; }
readable() { [ "$(checksum "$1")" = "$data" ]; }
late_rows() { [ "$(as_postgres psql -XAtq -h "$here/run" -p 54712 -c "SELECT count(*) FROM late")" = "$1" ]; }
cannot() { ! "$@"; }
holds_files() { [ "$(find "$1" -type f | wc -l)" -gt 10 ]; }
read_any() { find "$1" -type f -exec cat {} + 2>/dev/null | grep -qa .; }
markers() { grep -hao HSMTDEMARKER "$1" | wc -l; }
no_marker() { sync && [ "$(markers "$1")" = 0 ]; }
with_pin() { "$hsm_tde" "$@" --pin-fd 3 3<"$here/secrets/pin_a"; }
with_recovery() { "$hsm_tde" "$@" --passphrase-fd 3 3<"$here/secrets/recovery"; }
state() { # All that must not change, the journal aside: it may say that somebody tried.
    (cd "$here" && find state tokens* -type f ! -name 'journal*' ! -name '*lock' -exec sha256sum {} + | sort -k2)
}

data=$(checksum 54711)
check "the marker is in the plain image" test "$(markers "$here/plain.img")" -gt 20000
check "the marker is nowhere in the encrypted cluster's image" no_marker "$here/cluster.img"
check "the marker is nowhere in the tablespaces' image" no_marker "$here/tablespaces.img"

say "-- the kernel's key is taken away"
check "close is refused while the server runs" refuses 5 runs "$hsm_tde" close demo-cluster
check "the refusal harmed nothing" readable 54711
stop "$here/cluster/data" fast >/dev/null
check "the keystore closes" "$hsm_tde" close demo-cluster
check "no file can be told by its name" test ! -e "$here/cluster/data/PG_VERSION"
check "there are files all the same" holds_files "$here/cluster/data"
check "none of them can be read" cannot read_any "$here/cluster/data"
check "the server does not start" cannot start demo-cluster "$here/cluster/data" 54711

say "-- the token's folder is moved away"
mv "$here/tokens" "$here/tokens.away"
mkdir -m 700 "$here/tokens"
before=$(state)
check "the keystore does not open, and says unreachable" refuses 6 unreachable with_pin open demo-cluster
for job in init_token:a configure_tde:a encrypted_tablespaces:b rotate_keys:a change_protection:a; do
    play=${job%:*}
    check "playbook $play ends in an error that says unreachable" \
        refuses 2 unreachable ansible-playbook -i localhost, "$scenario/without_token.yml" -e "play=$play token=${job#*:} directory=$here"
done
check "nothing was changed and nothing created" test "$before" = "$(state)"
check "the recovery keyslot opens without the token" with_recovery open demo-cluster
start demo-cluster "$here/cluster/data" 54711 >/dev/null
check "the data is as it was" readable 54711
stop "$here/cluster/data" fast >/dev/null
"$hsm_tde" close demo-cluster
rmdir "$here/tokens"
mv "$here/tokens.away" "$here/tokens"
check "with the token back, it opens with the PIN" with_pin open demo-cluster
start demo-cluster "$here/cluster/data" 54711 >/dev/null
check "the data is as it was" readable 54711

say "-- a server crashes, and its encrypted file system is not mounted when it starts again"
as_postgres psql -XAtq -h "$here/run" -p 54712 -c "DROP TABLE IF EXISTS late" -c "CREATE TABLE late AS SELECT 'HSMTDELATE' || n AS t FROM generate_series(1, 2000) n" \
    -c "ALTER TABLE late SET TABLESPACE sealed"
kill -KILL -- "$(head -1 "$here/plain/data/postmaster.pid")"
sleep 1
"$hsm_tde" close demo-tablespaces
umount "$here/tablespaces"
check "crash recovery does not start without the mount" cannot start demo-tablespaces "$here/plain/data" 54712
check "nothing was written in its place" test -z "$(ls -A "$here/tablespaces")"
check "the second token's PIN opens it, mount included" "$hsm_tde" open demo-tablespaces --pin-fd 3 3<"$here/secrets/pin_b"
rm -f "$here/plain/data/postmaster.pid"
start demo-tablespaces "$here/plain/data" 54712 >/dev/null
check "all rows are there, those of the last second too" late_rows 2000
check "the data is as it was" readable 54712
check "the marker is nowhere in the tablespaces' image" no_marker "$here/tablespaces.img"
check "the journal is whole" "$hsm_tde" journal verify
[ "$fails" = 0 ]
