/* What the parts of the stand-in inside the server share. */
#ifndef FEP_STANDIN_H
#define FEP_STANDIN_H

#include "postgres.h"
#include "keystore.h"
#include "storage/lwlock.h"

/* One way of keeping the master key: file, tde_z, tde_kms. A function gives NULL or the reason why not. */
typedef struct Keystore
{
	const char *kind;
	const char *(*set_master_key) (const char *secret);
	const char *(*open) (const char *secret);
	const char *(*set_passphrase) (const char *old, const char *new);
	/* In the postmaster; secret: what pg_ctl passed on, or NULL. False: it was not to be opened now. */
	bool		(*open_at_start) (const char *secret, const char **wrong);
	bool		reopens;		/* opening what is open connects again */
} Keystore;

/* Lost with the server's memory, as the product's open keystore is. */
typedef struct FepShared
{
	LWLock		lock;
	bool		open;
	unsigned char dek[DEK_BYTES];	/* tde_kms: what the master key wraps */
} FepShared;

extern FepShared *fep_shared;
extern char *fep_keystore_location;
extern int	fep_algorithm;
extern const char *const fep_algorithms[];

extern void fep_use(const Keystore *keystore);
extern void fep_guard(const char *function);
extern void fep_refuse(const char *what, const char *why) pg_attribute_noreturn();
extern void fep_tablespaces_init(void);

#endif
