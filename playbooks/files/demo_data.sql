-- Data with a marker that a search of the raw disk can find: a table, an index, statistics,
-- and a sort that spills into temporary files.
\set ON_ERROR_STOP on
BEGIN;
CREATE TABLE patients (id bigint PRIMARY KEY, name text NOT NULL, note text NOT NULL);
INSERT INTO patients
SELECT n, 'HSMTDEMARKER patient ' || n, md5(n::text) || ' HSMTDEMARKER ' || md5((n * 7)::text)
FROM generate_series(1, 20000) AS n;
CREATE INDEX patients_name ON patients (name);
CREATE TABLE visits (id bigint PRIMARY KEY, patient bigint REFERENCES patients, note text) PARTITION BY RANGE (id);
CREATE TABLE visits_1 PARTITION OF visits FOR VALUES FROM (0) TO (5000);
CREATE TABLE visits_2 PARTITION OF visits FOR VALUES FROM (5000) TO (10000);
INSERT INTO visits SELECT n, n + 1, 'HSMTDEMARKER visit ' || md5(n::text) FROM generate_series(1, 9999) AS n;
CREATE MATERIALIZED VIEW busy AS SELECT patient, count(*) AS visits FROM visits GROUP BY patient;
COMMIT;
ALTER TABLE patients ALTER COLUMN name SET STATISTICS 500;
ANALYZE;
SET work_mem = '64kB';
SELECT count(*) FROM (SELECT note FROM patients ORDER BY note || name) AS spilled;
CHECKPOINT;
