-- FEP stand-in (encrypts nothing).
CREATE FUNCTION pgx_declare_external_master_key(
    kms_name text DEFAULT NULL, key_id text DEFAULT NULL, sslpassphrase text DEFAULT NULL, kms_secret text DEFAULT NULL)
    RETURNS void LANGUAGE c AS 'MODULE_PATHNAME', 'fep_declare_external_master_key';

CREATE FUNCTION pgx_open_keystore(sslpassphrase text DEFAULT NULL, kms_secret text DEFAULT NULL)
    RETURNS void LANGUAGE c AS '$libdir/fep_standin', 'fep_open_keystore';
