

/*
 * FEP stand-in (encrypts nothing): what Fujitsu Enterprise Postgres has in pg_catalog.
 */
CREATE FUNCTION pgx_set_master_key(passphrase text) RETURNS void
    LANGUAGE c STRICT AS '$libdir/fep_standin', 'fep_set_master_key';
COMMENT ON FUNCTION pgx_set_master_key(text) IS 'FEP stand-in: encrypts nothing';

CREATE FUNCTION pgx_open_keystore(passphrase text) RETURNS void
    LANGUAGE c STRICT AS '$libdir/fep_standin', 'fep_open_keystore';
COMMENT ON FUNCTION pgx_open_keystore(text) IS 'FEP stand-in: encrypts nothing';

CREATE FUNCTION pgx_set_keystore_passphrase("oldPassphrase" text, "newPassphrase" text) RETURNS void
    LANGUAGE c STRICT AS '$libdir/fep_standin', 'fep_set_keystore_passphrase';
COMMENT ON FUNCTION pgx_set_keystore_passphrase(text, text) IS 'FEP stand-in: encrypts nothing';

CREATE VIEW pgx_tablespaces AS
    SELECT
        T.oid AS spctablespace,
        coalesce(L.label, 'none') AS spcencalgo
    FROM pg_tablespace T
        LEFT JOIN pg_shseclabel L ON
            (L.objoid = T.oid AND L.classoid = T.tableoid AND L.provider = 'fep_standin');
COMMENT ON VIEW pgx_tablespaces IS 'FEP stand-in: encrypts nothing, whatever spcencalgo says';

CREATE VIEW fep_standin AS
    SELECT 'FEP stand-in: THIS SERVER ENCRYPTS NOTHING'::text AS what;
