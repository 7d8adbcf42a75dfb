/* Loads the stand-in into `postgres` before postgresql.conf is read.
 *
 * keystore_location and tablespace_encryption_algorithm have no dot in their names, so the server knows them
 * only if they are defined before the file is parsed, which is earlier than any preloaded library. getopt()
 * is the first thing of another library that the server calls once its parameters can be defined. This file
 * may use nothing of PostgreSQL's: it is loaded before it.
 */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void
load_standin(void)
{
	static const int here;
	char		path[4096];
	Dl_info		self;
	void	   *library;
	void		(*init) (void) = NULL;

	if (dladdr(&here, &self) == 0)
		_exit(70);
	snprintf(path, sizeof(path), "%s", self.dli_fname);
	snprintf(strrchr(path, '/') + 1, 32, "fep_standin.so");
	library = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
	if (library != NULL)
		init = (void (*) (void)) dlsym(library, "fep_standin_init");
	if (init == NULL)
	{
		fprintf(stderr, "FEP stand-in: %s\n", dlerror());
		_exit(70);
	}
	init();
}

int
getopt(int argc, char *const argv[], const char *options)
{
	static int	(*real) (int, char *const[], const char *);

	if (real == NULL)
	{
		real = (int (*) (int, char *const[], const char *)) dlsym(RTLD_NEXT, "getopt");
		load_standin();
	}
	return real(argc, argv, options);
}
