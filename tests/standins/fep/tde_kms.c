/* The library `tde_kms`: the master key is a key of a key management system, reached by a custom plug-in. */
#include "standin.h"

#include "fmgr.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/guc.h"

PG_MODULE_MAGIC;

/* In the data directory, so that a base backup has it. */
#define DECLARED "pgx_external_master_key.fep_standin"
#define WRAPPED_MAX 8192

static char *conninfo_file = NULL;
static char *plugin_path = NULL;
static bool enable_shared_dek = false;

/* What is known of the declared master key. */
typedef struct Declared
{
	char		kms_name[64];
	char		key_id[512];
	unsigned	length;
	unsigned char wrapped[WRAPPED_MAX];
	unsigned char proof[KCV_BYTES];	/* of the data key, so that another key's answer is seen */
} Declared;

/* No cryptography is meant: it only tells two data keys apart. */
static void
proof_of(const unsigned char *dek, unsigned char *proof)
{
	memset(proof, 0, KCV_BYTES);
	for (int i = 0; i < DEK_BYTES; i++)
		proof[i % KCV_BYTES] = proof[i % KCV_BYTES] * 31 + dek[i];
}

static bool
declared(void)
{
	return access(DECLARED, F_OK) == 0;
}

static const char *
read_declared(Declared *key)
{
	size_t		length;
	const char *wrong;

	if (!declared())
		return reason("no master encryption key has been declared");
	wrong = read_private_file(DECLARED, key, sizeof(*key), &length);
	return wrong == NULL && length != sizeof(*key) ? reason("\"%s\" is damaged", DECLARED) : wrong;
}

/* The credentials for opening at start: made again for each new secret, for this machine alone. */
static const char *
remember_secret(const Kms *kms, const char *secret)
{
	char		machine[400];
	char	   *content;
	const char *wrong;

	if (!kms->obfuscated[0] || secret == NULL)
		return NULL;
	if ((wrong = this_machine(machine, sizeof(machine))) != NULL)
		return wrong;
	content = psprintf("%s\n%s", machine, secret);
	return write_private_file(kms->obfuscated, content, strlen(content));
}

static const char *
remembered_secret(const Kms *kms, char *secret, size_t size)
{
	char		machine[400];
	char		content[SECRET_MAX + 400];
	char	   *end;
	size_t		length;
	const char *wrong = this_machine(machine, sizeof(machine));

	if (wrong == NULL)
		wrong = read_private_file(kms->obfuscated, content, sizeof(content) - 1, &length);
	if (wrong != NULL)
		return wrong;
	content[length] = '\0';
	end = strchr(content, '\n');
	if (end == NULL)
		return reason("\"%s\" is damaged", kms->obfuscated);
	*end = '\0';
	if (strcmp(content, machine) != 0)
		return reason("\"%s\" was made on another machine", kms->obfuscated);
	strlcpy(secret, end + 1, size);
	return NULL;
}

static const char *
unwrap(const Kms *kms, const Declared *key, const char *secret, unsigned char *dek)
{
	unsigned char answer[WRAPPED_MAX];
	unsigned char proof[KCV_BYTES];
	size_t		length;
	const char *wrong = plugin_run(kms, "validate-key", key->key_id, secret, NULL, 0, answer, sizeof(answer), &length);

	if (wrong == NULL)
		wrong = plugin_run(kms, "decrypt", key->key_id, secret, key->wrapped, key->length, answer, sizeof(answer), &length);
	if (wrong != NULL)
		return wrong;
	proof_of(answer, proof);
	if (length != DEK_BYTES || memcmp(proof, key->proof, sizeof(proof)) != 0)
		return reason("the plug-in of \"%s\" decrypted to other data", kms->name);
	memcpy(dek, answer, DEK_BYTES);
	return NULL;
}

static const char *
open_keystore(const char *secret)
{
	Declared	key;
	Kms			kms;
	unsigned char dek[DEK_BYTES];
	const char *wrong = read_declared(&key);

	if (wrong == NULL)
		wrong = kms_lookup(conninfo_file, plugin_path, key.kms_name, &kms);
	if (wrong == NULL)
		wrong = unwrap(&kms, &key, secret, dek);
	if (wrong == NULL)
		wrong = remember_secret(&kms, secret);
	if (wrong == NULL)
		memcpy(fep_shared->dek, dek, DEK_BYTES);
	return wrong;
}

/* The data key is wrapped by the new master key, and unwrapped to see that it comes back, before it counts. */
static const char *
declare(const char *kms_name, const char *key_id, const char *secret)
{
	Declared	key = {0};
	Kms			kms;
	unsigned char dek[DEK_BYTES];
	unsigned char again[DEK_BYTES];
	size_t		length;
	const char *wrong;

	if (declared() && !fep_shared->open)
		return reason("the keystore is not open");
	if (strlen(kms_name) >= sizeof(key.kms_name) || strlen(key_id) >= sizeof(key.key_id))
		return reason("kms_name or key_id is too long");
	if ((wrong = kms_lookup(conninfo_file, plugin_path, kms_name, &kms)) != NULL)
		return wrong;
	if (declared())
		memcpy(dek, fep_shared->dek, DEK_BYTES);
	else if ((wrong = random_bytes(dek, DEK_BYTES)) != NULL)
		return wrong;
	strlcpy(key.kms_name, kms_name, sizeof(key.kms_name));
	strlcpy(key.key_id, key_id, sizeof(key.key_id));
	proof_of(dek, key.proof);
	wrong = plugin_run(&kms, "validate-key", key_id, secret, NULL, 0, key.wrapped, sizeof(key.wrapped), &length);
	if (wrong == NULL)
		wrong = plugin_run(&kms, "encrypt", key_id, secret, dek, DEK_BYTES, key.wrapped, sizeof(key.wrapped), &length);
	if (wrong != NULL)
		return wrong;
	key.length = length;
	if ((wrong = unwrap(&kms, &key, secret, again)) != NULL)
		return wrong;
	if ((wrong = write_private_file(DECLARED, &key, sizeof(key))) != NULL)
		return wrong;
	memcpy(fep_shared->dek, dek, DEK_BYTES);
	return remember_secret(&kms, secret);
}

PG_FUNCTION_INFO_V1(fep_declare_external_master_key);
Datum
fep_declare_external_master_key(PG_FUNCTION_ARGS)
{
	const char *wrong;

	fep_guard("pgx_declare_external_master_key");
	PreventCommandDuringRecovery("pgx_declare_external_master_key");
	if (conninfo_file == NULL || conninfo_file[0] == '\0')
		fep_refuse("could not declare the master encryption key", "tde_kms.kms_conninfo_file is not set");
	if (PG_ARGISNULL(0) || PG_ARGISNULL(1))
		fep_refuse("could not declare the master encryption key", "kms_name and key_id cannot be omitted");
	LWLockAcquire(&fep_shared->lock, LW_EXCLUSIVE);
	wrong = declare(text_to_cstring(PG_GETARG_TEXT_PP(0)), text_to_cstring(PG_GETARG_TEXT_PP(1)),
					PG_ARGISNULL(3) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(3)));
	if (wrong == NULL)
		fep_shared->open = true;
	LWLockRelease(&fep_shared->lock);
	if (wrong != NULL)
		fep_refuse("could not declare the master encryption key", wrong);
	PG_RETURN_VOID();
}

static const char *
set_master_key(const char *secret)
{
	return reason("with a key management system the key is declared by pgx_declare_external_master_key");
}

static const char *
set_passphrase(const char *old, const char *new)
{
	return reason("with a key management system there is no passphrase to change");
}

static bool
open_at_start(const char *secret, const char **wrong)
{
	Declared	key;
	Kms			kms;
	char		remembered[SECRET_MAX];

	if (secret == NULL)
	{
		if (!declared())
			return false;
		*wrong = read_declared(&key);
		if (*wrong == NULL)
			*wrong = kms_lookup(conninfo_file, plugin_path, key.kms_name, &kms);
		if (*wrong != NULL)
			return true;
		if (!kms.obfuscated[0] || access(kms.obfuscated, F_OK) != 0)
			return false;
		*wrong = remembered_secret(&kms, remembered, sizeof(remembered));
		if (*wrong != NULL)
			return true;
		secret = remembered;
	}
	*wrong = open_keystore(secret);
	return true;
}

static const Keystore kms_keystore = {"tde_kms", set_master_key, open_keystore, set_passphrase, open_at_start, true};

PGDLLEXPORT void _PG_init(void);
void
_PG_init(void)
{
	if (!process_shared_preload_libraries_in_progress)
		ereport(ERROR, (errmsg("tde_kms must be loaded by shared_preload_libraries")));
	DefineCustomStringVariable("tde_kms.kms_conninfo_file", "File of the key management systems.", NULL, &conninfo_file, "",
							   PGC_POSTMASTER, 0, NULL, NULL, NULL);
	DefineCustomStringVariable("tde_kms.plugin_path", "Folder of the custom plug-ins.", NULL, &plugin_path, "",
							   PGC_POSTMASTER, 0, NULL, NULL, NULL);
	DefineCustomBoolVariable("tde_kms.enable_shared_dek", "Share the keys of tablespaces (without effect here).", NULL,
							 &enable_shared_dek, false, PGC_POSTMASTER, 0, NULL, NULL, NULL);
	MarkGUCPrefixReserved("tde_kms");
	if (conninfo_file[0] == '\0')
		return;
	if (fep_keystore_location[0] != '\0')
		ereport(FATAL, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("keystore_location and tde_kms.kms_conninfo_file exclude each other")));
	fep_use(&kms_keystore);
}
