#!/usr/bin/env bash
# What a thief and an outage would find. Everything is judged from outside: files, a server that starts or does not.
# The functions are called by check.
# shellcheck disable=SC2317
set -euo pipefail
here=$1 python=$2
world=$(dirname "$0")/files/world.py
fails=0

check() { # check WHAT COMMAND...
    local what=$1
    shift
    if "$@" >/dev/null 2>&1; then printf 'ok: %s\n' "$what"; else
        printf 'NOT OK: %s\n' "$what"
        fails=$((fails + 1))
    fi
}
cannot() { ! "$@"; }
sql() { setpriv --reuid postgres --clear-groups psql -XAtqh "$here/server/socket" -d shop -c "$1"; }
server() { "$python" "$world" "$here" "$1"; }
is() { [ "$1" = "$2" ]; }
data() { sql "SELECT count(*), md5(string_agg(body, ',' ORDER BY id)) FROM orders"; }

before=$(data)
check "the tables are under the access method" is "$(sql "SELECT pg_tde_is_encrypted('orders'), pg_tde_is_encrypted('orders_pkey')")" "t|t"
for key in '' default_ server_; do
    check "the key of pg_tde_${key}key_info is the last one, in Vault" is "$(sql "SELECT key_name, provider_name FROM pg_tde_${key}key_info()")" "hsm-tde.main.4|hsm-tde-vault-v2"
done
check "the write-ahead log is encrypted, as the server says" is "$(sql 'SHOW pg_tde.wal_encrypt')" on
check "every former provider is still there, for backups" is "$(sql 'SELECT count(*) FROM pg_tde_list_all_global_key_providers()')" 3
check "close is refused while the server runs" cannot "$here/bin/hsm-tde" close main
check "the server stops" server down
check "the keystore closes" "$here/bin/hsm-tde" close main
check "without what it is given the server does not start" cannot server up
check "at boot the keystore opens, and nobody is asked" "$here/bin/hsm-tde" open main
check "no key of the file lies in memory any more" cannot test -e "$here/keys/keys"
check "then the server starts" server up
check "the data is as it was" is "$before" "$(data)"
check "the PIN is in no file but its own" cannot grep -rqFf "$here/secrets/pin" "$here/state" "$here/server/data" "$here/server/log"
exit "$fails"
