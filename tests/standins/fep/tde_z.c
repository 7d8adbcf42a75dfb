/* The library `tde_z`: the master key is a key in a token of the real openCryptoki. */
#include "standin.h"

#include "fmgr.h"
#include "miscadmin.h"
#include "utils/guc.h"

PG_MODULE_MAGIC;

static int	slot_id = 0;
static char *user_pin = NULL;

/* The key is made under an id of its own before the keystore names it: a failure leaves the old one in force. */
static const char *
set_master_key(const char *pin)
{
	KeystoreFile file;
	unsigned char id[KEY_ID_BYTES];
	unsigned char kcv[KCV_BYTES];
	const char *wrong;

	if (fep_keystore_location[0] == '\0')
		return reason("keystore_location is not set");
	if (keystore_exists(fep_keystore_location, "keystore.ks"))
	{
		wrong = keystore_read(fep_keystore_location, "keystore.ks", &file);
		if (wrong != NULL)
			return wrong;
		if (!file.kcv[0])
			return reason("the keystore is a file keystore");
	}
	memset(&file, 0, sizeof(file));
	wrong = random_bytes(id, sizeof(id));
	if (wrong == NULL)
		wrong = token_create(slot_id, pin, id, kcv);
	if (wrong != NULL)
		return wrong;
	hex(id, sizeof(id), file.key);
	hex(kcv, sizeof(kcv), file.kcv);
	return keystore_write(fep_keystore_location, "keystore.ks", &file);
}

static const char *
open_keystore(const char *pin)
{
	KeystoreFile file;
	unsigned char id[KEY_ID_BYTES];
	unsigned char kcv[KCV_BYTES];
	char		found[2 * KCV_BYTES + 1];
	const char *wrong;

	if (fep_keystore_location[0] == '\0')
		return reason("keystore_location is not set");
	wrong = keystore_read(fep_keystore_location, "keystore.ks", &file);
	if (wrong == NULL && (!file.kcv[0] || !unhex(file.key, id, sizeof(id))))
		wrong = reason("the keystore is a file keystore");
	if (wrong == NULL)
		wrong = token_find(slot_id, pin, id, kcv);
	if (wrong != NULL)
		return wrong;
	hex(kcv, sizeof(kcv), found);
	return strcmp(found, file.kcv) == 0 ? NULL : reason("the token's key is not the master key");
}

static const char *
set_passphrase(const char *old, const char *new)
{
	return reason("with tde_z the user PIN is changed in the token");
}

/* A wrong USER_PIN spends one of the token's tries at each start. */
static bool
open_at_start(const char *secret, const char **wrong)
{
	const char *pin = secret ? secret : user_pin;

	if (pin == NULL || pin[0] == '\0' || fep_keystore_location[0] == '\0'
		|| !keystore_exists(fep_keystore_location, "keystore.ks"))
		return false;
	*wrong = open_keystore(pin);
	return true;
}

static const Keystore token_keystore = {"tde_z", set_master_key, open_keystore, set_passphrase, open_at_start, false};

PGDLLEXPORT void _PG_init(void);
void
_PG_init(void)
{
	if (!process_shared_preload_libraries_in_progress)
		ereport(ERROR, (errmsg("tde_z must be loaded by shared_preload_libraries")));
	DefineCustomIntVariable("tde_z.SLOT_ID", "Slot of openCryptoki.", NULL, &slot_id, 0, 0, INT_MAX, PGC_POSTMASTER, 0,
							NULL, NULL, NULL);
	DefineCustomStringVariable("tde_z.USER_PIN", "User PIN of the token.", NULL, &user_pin, "", PGC_POSTMASTER,
							   GUC_SUPERUSER_ONLY, NULL, NULL, NULL);
	MarkGUCPrefixReserved("tde_z");
	fep_use(&token_keystore);
}
