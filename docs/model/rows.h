/* A row of the code's transition tables is taken. With -DCOVER the search prints which rows it has seen taken. */
#ifdef COVER
c_decl { static unsigned char seen_row[ROWS]; }
#define ROW(n) c_code { if (!seen_row[n]) { seen_row[n] = 1; printf("row %d\n", n); } }
#else
#define ROW(n) assert(n < ROWS)
#endif

/* A property is broken: check.sh knows what it is called. */
#define broken(n) assert(n != n)
#define must(n, holds) if :: holds :: else -> broken(n) fi
