/* Keys in a token of the real openCryptoki.
 *
 * The library is used in a child process alone: it starts threads, holds shared memory and may hang on a
 * daemon that is gone, none of which a server process may do.
 */
#include "keystore.h"

#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* PKCS#11 2.40, only what is used here. */
typedef unsigned long Ulong;
typedef struct
{
	Ulong		type;
	void	   *value;
	Ulong		length;
} Attribute;
typedef struct
{
	Ulong		mechanism;
	void	   *parameter;
	Ulong		length;
} Mechanism;

enum
{
	CKA_CLASS = 0x0, CKA_TOKEN = 0x1, CKA_PRIVATE = 0x2, CKA_LABEL = 0x3, CKA_ID = 0x102, CKA_SENSITIVE = 0x103,
	CKA_ENCRYPT = 0x104, CKA_DECRYPT = 0x105, CKA_VALUE_LEN = 0x161, CKA_EXTRACTABLE = 0x162,
	CKO_SECRET_KEY = 4, CKM_AES_KEY_GEN = 0x1080, CKM_AES_ECB = 0x1081, CKU_USER = 1,
	CKF_RW_SESSION = 2, CKF_SERIAL_SESSION = 4
};

#define KEY_LABEL "FEP_MASTER_KEY"
#define SECONDS 20

/* What the child answers through the pipe. */
typedef struct
{
	Ulong		rv;
	char		step[32];
	unsigned char kcv[KCV_BYTES];
} Answer;

static const struct
{
	Ulong		rv;
	const char *name;
}			names[] = {
	{0x2, "CKR_HOST_MEMORY"}, {0x3, "CKR_SLOT_ID_INVALID"}, {0x5, "CKR_GENERAL_ERROR"}, {0x6, "CKR_FUNCTION_FAILED"},
	{0xA0, "CKR_PIN_INCORRECT"}, {0xA2, "CKR_PIN_LEN_RANGE"}, {0xA4, "CKR_PIN_LOCKED"},
	{0xE0, "CKR_TOKEN_NOT_PRESENT"}, {0xE1, "CKR_TOKEN_NOT_RECOGNIZED"}, {0x102, "CKR_USER_PIN_NOT_INITIALIZED"},
};

static Ulong
call(Answer *answer, const char *step, Ulong rv)
{
	if (rv != 0 && answer->rv == 0)
	{
		answer->rv = rv;
		snprintf(answer->step, sizeof(answer->step), "%s", step);
	}
	return rv;
}

/* Every call goes through here: a symbol that is missing is an answer too. */
#define CALL(name, ...) \
	(symbol = (Ulong (*)()) dlsym(library, #name), \
	 call(answer, #name, symbol == NULL ? 0x54 /* CKR_FUNCTION_NOT_SUPPORTED */ : symbol(__VA_ARGS__)))

static void
use_token(Ulong slot, const char *pin, const unsigned char *id, bool create, Answer *answer)
{
	Ulong		(*symbol) ();
	Ulong		session = 0, key = 0, found = 0, class = CKO_SECRET_KEY, bits = 32;
	Ulong		length = 16;
	unsigned char yes = 1, no = 0, block[16] = {0}, output[16];
	Mechanism	generate = {CKM_AES_KEY_GEN, NULL, 0}, ecb = {CKM_AES_ECB, NULL, 0};
	Attribute	made[] = {
		{CKA_CLASS, &class, sizeof(class)}, {CKA_LABEL, KEY_LABEL, strlen(KEY_LABEL)}, {CKA_ID, (void *) id, KEY_ID_BYTES},
		{CKA_VALUE_LEN, &bits, sizeof(bits)}, {CKA_TOKEN, &yes, 1}, {CKA_PRIVATE, &yes, 1}, {CKA_SENSITIVE, &yes, 1},
		{CKA_EXTRACTABLE, &no, 1}, {CKA_ENCRYPT, &yes, 1}, {CKA_DECRYPT, &yes, 1},
	};
	/* The usual name first; the packages of some systems have the versioned one alone. */
	void	   *library = dlopen("libopencryptoki.so", RTLD_NOW);

	if (library == NULL)
		library = dlopen("libopencryptoki.so.0", RTLD_NOW);
	if (library == NULL)
	{
		call(answer, "dlopen", 0x5);
		return;
	}
	if (CALL(C_Initialize, NULL)
		|| CALL(C_OpenSession, slot, (Ulong) (CKF_SERIAL_SESSION | (create ? CKF_RW_SESSION : 0)), NULL, NULL, &session))
		return;
	if (CALL(C_Login, session, (Ulong) CKU_USER, pin, (Ulong) strlen(pin)) == 0)
	{
		if (create)
			CALL(C_GenerateKey, session, &generate, made, (Ulong) (sizeof(made) / sizeof(made[0])), &key);
		/* Looked for even if just made: what is found again is what was stored. */
		if (answer->rv == 0 && CALL(C_FindObjectsInit, session, made, 3UL) == 0)
		{
			CALL(C_FindObjects, session, &key, 1UL, &found);
			CALL(C_FindObjectsFinal, session);
			if (answer->rv == 0 && found != 1)
				call(answer, "find the master key", 0x82 /* CKR_OBJECT_HANDLE_INVALID */ );
		}
		if (answer->rv == 0 && CALL(C_EncryptInit, session, &ecb, key) == 0
			&& CALL(C_Encrypt, session, block, 16UL, output, &length) == 0)
			memcpy(answer->kcv, output, KCV_BYTES);
	}
	CALL(C_CloseSession, session);
	CALL(C_Finalize, NULL);
}

static const char *
in_child(long slot, const char *pin, const unsigned char *id, bool create, unsigned char *kcv)
{
	Answer		answer = {0};
	ssize_t		got;
	pid_t		child;
	int			ends[2];

	if (pipe(ends) != 0)
		return reason("pipe: %s", strerror(errno));
	child = fork();
	if (child < 0)
		return reason("fork: %s", strerror(errno));
	if (child == 0)
	{
		sigset_t	none;

		/* None of the server's handlers may run here; the alarm ends a library that hangs. */
		for (int number = 1; number < NSIG; number++)
			signal(number, SIG_DFL);
		sigemptyset(&none);
		sigprocmask(SIG_SETMASK, &none, NULL);
		alarm(SECONDS);
		close(ends[0]);
		use_token((Ulong) slot, pin, id, create, &answer);
		if (write(ends[1], &answer, sizeof(answer)) != sizeof(answer))
			_exit(1);
		_exit(0);
	}
	close(ends[1]);
	do
		got = read(ends[0], &answer, sizeof(answer));
	while (got < 0 && errno == EINTR);
	close(ends[0]);
	while (waitpid(child, NULL, 0) < 0 && errno == EINTR)
		;
	if (got != sizeof(answer))
		return reason("the token in slot %ld did not answer within %d seconds", slot, SECONDS);
	if (answer.rv != 0)
	{
		const char *name = "";

		for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
			if (names[i].rv == answer.rv)
				name = names[i].name;
		return reason("slot %ld: %s failed: 0x%lX %s", slot, answer.step, answer.rv, name);
	}
	memcpy(kcv, answer.kcv, KCV_BYTES);
	return NULL;
}

const char *
token_create(long slot, const char *pin, const unsigned char *id, unsigned char *kcv)
{
	return in_child(slot, pin, id, true, kcv);
}

const char *
token_find(long slot, const char *pin, const unsigned char *id, unsigned char *kcv)
{
	return in_child(slot, pin, id, false, kcv);
}
