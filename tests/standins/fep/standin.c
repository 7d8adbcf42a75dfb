/* A stand-in for Fujitsu Enterprise Postgres: keystore functions, parameters, the file keystore.
 *
 * IT ENCRYPTS NOTHING. README.md names the source of each behaviour, or says that it is assumed.
 */
#include "standin.h"

#include <unistd.h>

#include "access/xact.h"
#include "access/xlog.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "storage/ipc.h"
#include "storage/shmem.h"
#include "utils/builtins.h"
#include "utils/guc.h"

PG_MODULE_MAGIC;

FepShared  *fep_shared = NULL;
char	   *fep_keystore_location = NULL;
int			fep_algorithm = 0;
const char *const fep_algorithms[] = {"none", "AES128", "AES256"};

static const struct config_enum_entry algorithm_options[] = {
	{"none", 0, false}, {"AES128", 1, false}, {"AES256", 2, false}, {NULL, 0, false}
};

static shmem_request_hook_type next_shmem_request = NULL;
static shmem_startup_hook_type next_shmem_startup = NULL;

/* ---- the file keystore ---- */

static bool
passphrase_length_good(const char *passphrase)
{
	return strlen(passphrase) >= 8 && strlen(passphrase) <= 200;
}

static const char *
new_master_key(KeystoreFile *file)
{
	unsigned char id[KEY_ID_BYTES];
	const char *wrong = random_bytes(id, sizeof(id));

	hex(id, sizeof(id), file->key);
	return wrong;
}

/* keystore.aks follows keystore.ks where there is one. */
static const char *
store(const KeystoreFile *file)
{
	const char *wrong = keystore_write(fep_keystore_location, "keystore.ks", file);

	if (wrong == NULL && keystore_exists(fep_keystore_location, "keystore.aks"))
		wrong = auto_open_write(fep_keystore_location, file);
	return wrong;
}

static const char *
file_unlock(KeystoreFile *file, const char *passphrase)
{
	const char *wrong = keystore_read(fep_keystore_location, "keystore.ks", file);

	if (wrong == NULL && file->kcv[0])
		return reason("the keystore belongs to tde_z");
	if (wrong == NULL && !passphrase_matches(file, passphrase))
		return reason("the passphrase is wrong");
	return wrong;
}

static const char *
file_set_master_key(const char *passphrase)
{
	KeystoreFile file = {0};
	const char *wrong;

	if (!passphrase_length_good(passphrase))
		return reason("passphrase is too short or too long");
	if (keystore_exists(fep_keystore_location, "keystore.ks"))
		wrong = file_unlock(&file, passphrase);
	else
		wrong = passphrase_set(&file, passphrase);
	if (wrong == NULL)
		wrong = new_master_key(&file);
	return wrong ? wrong : store(&file);
}

static const char *
file_open(const char *passphrase)
{
	KeystoreFile file;

	return file_unlock(&file, passphrase);
}

static const char *
file_set_passphrase(const char *old, const char *new)
{
	KeystoreFile file;
	const char *wrong;

	if (!passphrase_length_good(new))
		return reason("passphrase is too short or too long");
	wrong = file_unlock(&file, old);
	if (wrong == NULL)
		wrong = passphrase_set(&file, new);
	return wrong ? wrong : store(&file);
}

static bool
file_open_at_start(const char *secret, const char **wrong)
{
	KeystoreFile file;
	char		machine[sizeof(file.machine)];

	if (secret != NULL)
	{
		*wrong = file_open(secret);
		return true;
	}
	if (!keystore_exists(fep_keystore_location, "keystore.aks"))
		return false;
	*wrong = keystore_read(fep_keystore_location, "keystore.aks", &file);
	if (*wrong == NULL)
		*wrong = this_machine(machine, sizeof(machine));
	if (*wrong == NULL && strcmp(machine, file.machine) != 0)
		*wrong = "keystore.aks was made on another machine";
	return true;
}

static const Keystore file_keystore = {
	"file", file_set_master_key, file_open, file_set_passphrase, file_open_at_start, false
};
static const Keystore *keystore = &file_keystore;

/* Called by tde_z and tde_kms as they are preloaded. */
void
fep_use(const Keystore *other)
{
	keystore = other;
}

/* ---- the SQL functions ---- */

/* Superusers, outside of transaction blocks. A DO block passes for no transaction block here. */
void
fep_guard(const char *function)
{
	if (!superuser())
		ereport(ERROR, (errcode(ERRCODE_INSUFFICIENT_PRIVILEGE), errmsg("must be superuser to execute %s", function)));
	if (IsTransactionBlock() || IsSubTransaction())
		ereport(ERROR, (errcode(ERRCODE_ACTIVE_SQL_TRANSACTION),
						errmsg("%s cannot run inside a transaction block", function)));
}

void
fep_refuse(const char *what, const char *why)
{
	/* The one text that is known from the manual. */
	if (strcmp(why, "passphrase is too short or too long") == 0)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE), errmsg("%s", why)));
	ereport(ERROR, (errcode(ERRCODE_EXTERNAL_ROUTINE_EXCEPTION), errmsg("%s: %s", what, why),
					errdetail("This text and its SQLSTATE are the stand-in's, not the product's.")));
}

static void
need_location(const char *function)
{
	if (keystore == &file_keystore && fep_keystore_location[0] == '\0')
		fep_refuse(function, "keystore_location is not set");
}

PG_FUNCTION_INFO_V1(fep_set_master_key);
Datum
fep_set_master_key(PG_FUNCTION_ARGS)
{
	const char *wrong;

	fep_guard("pgx_set_master_key");
	PreventCommandDuringRecovery("pgx_set_master_key");
	need_location("pgx_set_master_key");
	LWLockAcquire(&fep_shared->lock, LW_EXCLUSIVE);
	wrong = keystore->set_master_key(text_to_cstring(PG_GETARG_TEXT_PP(0)));
	if (wrong == NULL)
		fep_shared->open = true;
	LWLockRelease(&fep_shared->lock);
	if (wrong != NULL)
		fep_refuse("could not set the master encryption key", wrong);
	PG_RETURN_VOID();
}

PG_FUNCTION_INFO_V1(fep_open_keystore);
Datum
fep_open_keystore(PG_FUNCTION_ARGS)
{
	/* With tde_kms: (sslpassphrase, kms_secret), each with a default. */
	int			argument = PG_NARGS() - 1;
	const char *secret = PG_ARGISNULL(argument) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(argument));
	const char *wrong;

	fep_guard("pgx_open_keystore");
	need_location("pgx_open_keystore");
	if (keystore->reopens != (PG_NARGS() == 2))
		fep_refuse("could not open the keystore", "these are not the arguments for this kind of keystore");
	if (secret == NULL && !keystore->reopens)
		PG_RETURN_NULL();
	LWLockAcquire(&fep_shared->lock, LW_EXCLUSIVE);
	if (fep_shared->open && !keystore->reopens)
		wrong = "the keystore is already open";
	else
		wrong = keystore->open(secret);
	if (wrong == NULL)
		fep_shared->open = true;
	LWLockRelease(&fep_shared->lock);
	if (wrong != NULL)
		fep_refuse("could not open the keystore", wrong);
	PG_RETURN_VOID();
}

PG_FUNCTION_INFO_V1(fep_set_keystore_passphrase);
Datum
fep_set_keystore_passphrase(PG_FUNCTION_ARGS)
{
	const char *wrong;

	fep_guard("pgx_set_keystore_passphrase");
	PreventCommandDuringRecovery("pgx_set_keystore_passphrase");
	need_location("pgx_set_keystore_passphrase");
	LWLockAcquire(&fep_shared->lock, LW_EXCLUSIVE);
	wrong = keystore->set_passphrase(text_to_cstring(PG_GETARG_TEXT_PP(0)), text_to_cstring(PG_GETARG_TEXT_PP(1)));
	LWLockRelease(&fep_shared->lock);
	if (wrong != NULL)
		fep_refuse("could not change the passphrase of the keystore", wrong);
	PG_RETURN_VOID();
}

/* ---- the server's start ---- */

/* What pg_ctl passed on in a file without a name. `postgres -C`, which pg_ctl may run first, reads it too. */
static bool
passed_on(char *secret, size_t size)
{
	const char *number = getenv("FEP_STANDIN_SECRET_FD");
	ssize_t		got;

	if (number == NULL)
		return false;
	got = pread(atoi(number), secret, size - 1, 0);
	close(atoi(number));
	unsetenv("FEP_STANDIN_SECRET_FD");
	if (got < 0)
		return false;
	secret[got] = '\0';
	return true;
}

static void
shmem_request(void)
{
	if (next_shmem_request)
		next_shmem_request();
	RequestAddinShmemSpace(MAXALIGN(sizeof(FepShared)));
}

static void
shmem_startup(void)
{
	char		secret[SECRET_MAX];
	bool		given;
	bool		found;
	const char *wrong = NULL;

	if (next_shmem_startup)
		next_shmem_startup();
	fep_shared = ShmemInitStruct("FEP stand-in", sizeof(FepShared), &found);
	if (found)
		return;
	memset(fep_shared, 0, sizeof(*fep_shared));
	LWLockInitialize(&fep_shared->lock, LWLockNewTrancheId());
	if (!IsPostmasterEnvironment)
		return;					/* initdb, and the server for one user */
	ereport(LOG, (errmsg("FEP stand-in: THIS SERVER ENCRYPTS NOTHING; it imitates the keystore (%s) of "
						 "Fujitsu Enterprise Postgres for tests", keystore->kind)));
	given = passed_on(secret, sizeof(secret));
	if (!keystore->open_at_start(given ? secret : NULL, &wrong))
		return;
	explicit_bzero(secret, sizeof(secret));
	if (wrong == NULL)
	{
		fep_shared->open = true;
		ereport(LOG, (errmsg("FEP stand-in: the keystore was opened at start")));
	}
	else
		ereport(given ? FATAL : WARNING, (errmsg("FEP stand-in: the keystore was not opened at start: %s", wrong)));
}

/* Called by shim.c before postgresql.conf is read. */
PGDLLEXPORT void fep_standin_init(void);
void
fep_standin_init(void)
{
	/* Parameters for the start alone may be defined while libraries are preloaded; this is about to be so. */
	process_shared_preload_libraries_in_progress = true;
	DefineCustomStringVariable("keystore_location", "Folder of the keystore.", NULL, &fep_keystore_location, "",
							   PGC_POSTMASTER, 0, NULL, NULL, NULL);
	process_shared_preload_libraries_in_progress = false;
	DefineCustomEnumVariable("tablespace_encryption_algorithm", "Algorithm of tablespaces to come.", NULL, &fep_algorithm, 0,
							 algorithm_options, PGC_USERSET, 0, NULL, NULL, NULL);
	next_shmem_request = shmem_request_hook;
	shmem_request_hook = shmem_request;
	next_shmem_startup = shmem_startup_hook;
	shmem_startup_hook = shmem_startup;
	fep_tablespaces_init();
}
