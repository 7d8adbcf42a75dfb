/* Encrypted tablespaces: their algorithm (a shared security label) and what a closed keystore refuses. */
#include "standin.h"

#include <dirent.h>

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/relation.h"
#include "access/table.h"
#include "access/xact.h"
#include "catalog/catalog.h"
#include "catalog/objectaccess.h"
#include "catalog/pg_class.h"
#include "catalog/pg_database.h"
#include "catalog/pg_tablespace.h"
#include "commands/defrem.h"
#include "commands/seclabel.h"
#include "commands/tablespace.h"
#include "executor/executor.h"
#include "miscadmin.h"
#include "nodes/parsenodes.h"
#include "postmaster/bgwriter.h"
#include "storage/fd.h"
#include "tcop/utility.h"
#include "utils/fmgroids.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"

#if PG_VERSION_NUM >= 170000
#include "catalog/pg_tablespace_d.h"
#endif

#define PROVIDER "fep_standin"
#define OPTION "tablespace_encryption_algorithm"

static ProcessUtility_hook_type next_utility = NULL;
static ExecutorCheckPerms_hook_type next_check_perms = NULL;
static object_access_hook_type next_object_access = NULL;

/* ---- the algorithm of a tablespace ---- */

static int
algorithm_of_word(const char *word)
{
	for (int i = 0; i < 3; i++)
		if (pg_strcasecmp(word, fep_algorithms[i]) == 0)
			return i;
	ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE), errmsg("invalid value for \"%s\": \"%s\"", OPTION, word)));
}

static ObjectAddress
address_of(Oid tablespace)
{
	ObjectAddress address;

	ObjectAddressSet(address, TableSpaceRelationId, tablespace);
	return address;
}

static bool
encrypted(Oid tablespace)
{
	ObjectAddress address = address_of(OidIsValid(tablespace) ? tablespace : MyDatabaseTableSpace);
	char	   *label;

	if (address.objectId == DEFAULTTABLESPACE_OID || address.objectId == GLOBALTABLESPACE_OID)
		return false;
	label = GetSecurityLabel(&address, PROVIDER);
	return label != NULL && strcmp(label, "none") != 0;
}

static void
record(const char *name, int algorithm)
{
	ObjectAddress address = address_of(get_tablespace_oid(name, false));

	SetSecurityLabel(&address, PROVIDER, algorithm ? fep_algorithms[algorithm] : NULL);
}

/* SECURITY LABEL in a dump: the same words, by superusers. */
static void
relabel(const ObjectAddress *object, const char *label)
{
	if (object->classId != TableSpaceRelationId || !superuser())
		ereport(ERROR, (errcode(ERRCODE_INSUFFICIENT_PRIVILEGE), errmsg("only superusers label tablespaces")));
	if (label != NULL)
		algorithm_of_word(label);
}

static void
need_open(const char *what)
{
	if (!fep_shared->open)
		fep_refuse(what, "the keystore is not open");
}

/* Take our option out of a list of options; NULL if it was not in it. */
static DefElem *
take_option(List **options)
{
	ListCell   *cell;

	foreach(cell, *options)
	{
		DefElem    *element = lfirst(cell);

		if (pg_strcasecmp(element->defname, OPTION) == 0 && element->defnamespace == NULL)
		{
			*options = foreach_delete_current(*options, cell);
			return element;
		}
	}
	return NULL;
}

/* A file in a database's folder is a relation, or one that was dropped after the last checkpoint. */
static bool
holds_data(Oid tablespace)
{
	char	   *top = psprintf("pg_tblspc/%u/%s", tablespace, TABLESPACE_VERSION_DIRECTORY);
	DIR		   *databases = AllocateDir(top);
	struct dirent *database;
	bool		found = false;

	while (!found && (database = ReadDir(databases, top)) != NULL)
	{
		char	   *folder = psprintf("%s/%s", top, database->d_name);
		DIR		   *files;
		struct dirent *file;

		if (database->d_name[0] == '.')
			continue;
		files = AllocateDir(folder);
		while (!found && (file = ReadDir(files, folder)) != NULL)
			found = file->d_name[0] != '.';
		FreeDir(files);
	}
	FreeDir(databases);
	return found;
}

/* ---- CREATE TABLESPACE, ALTER TABLESPACE SET and RESET ---- */

static PlannedStmt *
copy_of(PlannedStmt *statement, bool *read_only_tree)
{
	/* The plan may be cached: nothing of it may be changed. */
	*read_only_tree = false;
	return copyObject(statement);
}

static void
utility(PlannedStmt *statement, const char *text, bool read_only_tree, ProcessUtilityContext context,
		ParamListInfo parameters, QueryEnvironment *environment, DestReceiver *receiver, QueryCompletion *completion)
{
	Node	   *node = statement->utilityStmt;
	ProcessUtility_hook_type run = next_utility ? next_utility : standard_ProcessUtility;
	DefElem    *option;

	if (IsA(node, CreateTableSpaceStmt))
	{
		CreateTableSpaceStmt *create;
		int			algorithm;

		statement = copy_of(statement, &read_only_tree);
		create = (CreateTableSpaceStmt *) statement->utilityStmt;
		option = take_option(&create->options);
		algorithm = option ? algorithm_of_word(defGetString(option)) : fep_algorithm;
		if (algorithm)
			need_open("could not create an encrypted tablespace");
		run(statement, text, read_only_tree, context, parameters, environment, receiver, completion);
		if (algorithm)
		{
			CommandCounterIncrement();
			record(create->tablespacename, algorithm);
		}
		return;
	}
	if (IsA(node, AlterTableSpaceOptionsStmt))
	{
		AlterTableSpaceOptionsStmt *alter;

		statement = copy_of(statement, &read_only_tree);
		alter = (AlterTableSpaceOptionsStmt *) statement->utilityStmt;
		option = take_option(&alter->options);
		if (option != NULL)
		{
			int			algorithm = alter->isReset ? 0 : algorithm_of_word(defGetString(option));
			Oid			tablespace = get_tablespace_oid(alter->tablespacename, false);

			if (tablespace == DEFAULTTABLESPACE_OID || tablespace == GLOBALTABLESPACE_OID)
				fep_refuse("could not change the encryption algorithm", "pg_default and pg_global cannot be encrypted");
			if (algorithm)
				need_open("could not change the encryption algorithm");
			/* With what is left, perhaps nothing: this looks who may. */
			run(statement, text, read_only_tree, context, parameters, environment, receiver, completion);
			if (!RecoveryInProgress())
				RequestCheckpoint(CHECKPOINT_IMMEDIATE | CHECKPOINT_FORCE | CHECKPOINT_WAIT);
			if (holds_data(tablespace))
				fep_refuse("could not change the encryption algorithm", "the tablespace is not empty");
			CommandCounterIncrement();
			record(alter->tablespacename, algorithm);
			return;
		}
	}
	run(statement, text, read_only_tree, context, parameters, environment, receiver, completion);
}

/* ---- a closed keystore ---- */

static void
need_open_for(Oid relation)
{
	Relation	opened = try_relation_open(relation, NoLock);
	List	   *indexes;
	ListCell   *cell;
	bool		closed;

	if (opened == NULL)
		return;
	closed = RELKIND_HAS_STORAGE(opened->rd_rel->relkind) && encrypted(opened->rd_rel->reltablespace);
	indexes = opened->rd_rel->relhasindex ? RelationGetIndexList(opened) : NIL;
	foreach(cell, indexes)
	{
		HeapTuple	tuple = SearchSysCache1(RELOID, ObjectIdGetDatum(lfirst_oid(cell)));

		if (HeapTupleIsValid(tuple))
		{
			closed = closed || encrypted(((Form_pg_class) GETSTRUCT(tuple))->reltablespace);
			ReleaseSysCache(tuple);
		}
	}
	relation_close(opened, NoLock);
	if (closed)
		fep_refuse("could not use an encrypted tablespace", "the keystore is not open");
}

/* Every statement that reads or writes a table comes by here; VACUUM and TRUNCATE do not. */
#if PG_VERSION_NUM >= 160000
static bool
check_perms(List *entries, List *permissions, bool report)
#else
static bool
check_perms(List *entries, bool report)
#endif
{
	ListCell   *cell;

	if (!fep_shared->open)
		foreach(cell, entries)
		{
			RangeTblEntry *entry = lfirst(cell);

			if (entry->rtekind == RTE_RELATION)
				need_open_for(entry->relid);
		}
#if PG_VERSION_NUM >= 160000
	return next_check_perms ? next_check_perms(entries, permissions, report) : true;
#else
	return next_check_perms ? next_check_perms(entries, report) : true;
#endif
}

/* The tablespace in a row that may be one of the running command's own. */
static Oid
tablespace_in(Oid catalog, Oid index, AttrNumber key, Oid object, bool *stored)
{
	Relation	relation = table_open(catalog, AccessShareLock);
	ScanKeyData search;
	SysScanDesc scan;
	HeapTuple	tuple;
	Oid			tablespace = InvalidOid;

	ScanKeyInit(&search, key, BTEqualStrategyNumber, F_OIDEQ, ObjectIdGetDatum(object));
	scan = systable_beginscan(relation, index, true, SnapshotSelf, 1, &search);
	tuple = systable_getnext(scan);
	*stored = HeapTupleIsValid(tuple);
	if (*stored && catalog == RelationRelationId)
	{
		tablespace = ((Form_pg_class) GETSTRUCT(tuple))->reltablespace;
		*stored = RELKIND_HAS_STORAGE(((Form_pg_class) GETSTRUCT(tuple))->relkind);
	}
	else if (*stored)
		tablespace = ((Form_pg_database) GETSTRUCT(tuple))->dattablespace;
	systable_endscan(scan);
	table_close(relation, AccessShareLock);
	return tablespace;
}

static void
object_access(ObjectAccessType access, Oid class, Oid object, int column, void *argument)
{
	bool		stored = false;
	Oid			tablespace = InvalidOid;

	if (next_object_access)
		next_object_access(access, class, object, column, argument);
	if (fep_shared == NULL || fep_shared->open || column != 0 || (access != OAT_POST_CREATE && access != OAT_POST_ALTER))
		return;
	if (class == RelationRelationId)
		tablespace = tablespace_in(class, ClassOidIndexId, Anum_pg_class_oid, object, &stored);
	else if (class == DatabaseRelationId)
		tablespace = tablespace_in(class, DatabaseOidIndexId, Anum_pg_database_oid, object, &stored);
	if (stored && encrypted(tablespace))
		fep_refuse("could not use an encrypted tablespace", "the keystore is not open");
}

void
fep_tablespaces_init(void)
{
	register_label_provider(PROVIDER, relabel);
	next_utility = ProcessUtility_hook;
	ProcessUtility_hook = utility;
	next_check_perms = ExecutorCheckPerms_hook;
	ExecutorCheckPerms_hook = check_perms;
	next_object_access = object_access_hook;
	object_access_hook = object_access;
}
