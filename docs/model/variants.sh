# shellcheck shell=bash
# The variants that check.sh runs: designs, which hold, and mutations, which are caught.

design rotation "overlap, 2 fail-overs" "-DFAILOVERS=2"
design rotation "overlap, every row a write, 1 fail-over" "-DFINE -DFAILOVERS=1"
design rotation "overlap, one node, 1 fail-over, 1 emergency" "-DN=1 -DFAILOVERS=1 -DEMERGENCIES=1"
design rotation "overlap, one node, every row a write, 1 emergency" "-DN=1 -DFINE -DFAILOVERS=0 -DEMERGENCIES=1"
design rotation "overlap, 1 emergency" "-DFAILOVERS=0 -DEMERGENCIES=1"
design rotation "overlap, one node, every row a write, 1 drift" "-DN=1 -DFINE -DFAILOVERS=0 -DDRIFTS=1"
design rotation "overlap, 1 drift" "-DFAILOVERS=0 -DDRIFTS=1"
design rotation "overlap, one node, 1 fail-over, 2 deletes" "-DN=1 -DFAILOVERS=1 -DDELETES=2"
design rotation "overlap, one node, 1 restored snapshot" "-DN=1 -DFAILOVERS=0 -DRESTORES=1"
design rotation "overlap, one node, 1 restored snapshot, 1 fail-over" "-DN=1 -DFAILOVERS=1 -DRESTORES=1"
design rotation "overlap, 1 restored snapshot" "-DFAILOVERS=0 -DRESTORES=1"
design rotation "overlap, one node, every row a write, 1 restored snapshot" "-DN=1 -DFINE -DFAILOVERS=0 -DRESTORES=1"
design rotation "alternate, 1 fail-over" "-DALTERNATE -DFAILOVERS=1"
design rotation "alternate, one node, 1 restored snapshot" "-DALTERNATE -DN=1 -DFAILOVERS=0 -DRESTORES=1"
design rotation "swap, one node, 1 restored snapshot" "-DSWAP -DN=1 -DFAILOVERS=0 -DRESTORES=1"
design rotation "alternate, one node, 1 emergency" "-DALTERNATE -DN=1 -DFAILOVERS=0 -DEMERGENCIES=1"
design rotation "swap, 1 fail-over" "-DSWAP -DFAILOVERS=1"
design rotation "swap, every row a write" "-DSWAP -DFINE -DFAILOVERS=0"
design rotation "swap, one node, 1 emergency" "-DSWAP -DN=1 -DFAILOVERS=0 -DEMERGENCIES=1"
design rotation "overlap, one node, faults stop" "-DLIVE -DN=1 -DM=2 -DFAILOVERS=1"
design rotation "alternate, one node, faults stop" "-DLIVE -DALTERNATE -DN=1 -DM=2 -DFAILOVERS=1"
design rotation "swap, one node, faults stop" "-DLIVE -DSWAP -DN=1 -DM=2 -DFAILOVERS=1"
design rotation "overlap, one node, 1 emergency, faults stop" "-DLIVE -DN=1 -DM=3 -DFAILOVERS=0 -DEMERGENCIES=1"

mutation rotation -DNOWAIT
mutation rotation -DNOINTENT
mutation rotation -DTRUSTPUT
mutation rotation -DREADAGAIN
mutation rotation -DSTALE -DFAILOVERS=2
mutation rotation -DREORDER
mutation rotation -DBLINDPROMOTE
mutation rotation -DDISCARD
mutation rotation -DPRUNE
mutation rotation -DBAREREFUSE -DDRIFTS=1
mutation rotation -DRECONCILEBLIND "-DDRIFTS=1 -DN=1"
mutation rotation -DEAGERUNDO
mutation rotation -DEAGERREFUSE
mutation rotation -DTURNAGAIN
mutation rotation -DPASTRETURN
mutation rotation -DNOCHECK
mutation rotation -DEAGERPUBLISH
mutation rotation -DSAMEUSER -DALTERNATE
mutation rotation -DSWAPLATE -DSWAP
mutation rotation -DSWAPBACK -DSWAP
mutation rotation -DSEIZENOW "-DEMERGENCIES=1 -DN=1"
mutation rotation -DSEIZEFORGETS "-DEMERGENCIES=1 -DN=1"
mutation rotation -DEMERGENCYBACK "-DEMERGENCIES=1 -DN=1"
mutation rotation -DTAKEOVERCANCEL "-DEMERGENCIES=1 -DN=1"
mutation rotation -DLATECANCEL "-DEMERGENCIES=1 -DN=1"
mutation rotation -DSPARES "-DEMERGENCIES=1 -DN=1"
mutation rotation -DDELETEBUSY -DDELETES=1
mutation rotation -DDROPTOMB -DDELETES=1
mutation rotation -DTOMBOLD "-DDELETES=2 -DN=1"
mutation rotation -DADOPTLAST -DDELETES=1
mutation rotation -DBLINDRESTORE "-DRESTORES=1 -DN=1"
mutation rotation -DTAKESBACK "-DRESTORES=1 -DN=1"
mutation rotation -DSUREBACK "-DRESTORES=1 -DN=1"
mutation rotation -DSUREGRACE "-DRESTORES=1 -DN=1"
mutation rotation -DNORESUME "-DLIVE -DN=1 -DM=2" "never ends"
mutation rotation -DNORETRY "-DLIVE -DN=1 -DM=2" "never ends"
mutation rotation -DNODEADLINE "-DLIVE -DN=1 -DM=2" "never ends"
mutation rotation -DSTUBBORN "-DLIVE -DN=1 -DM=2 -DFAILOVERS=0 -DEMERGENCIES=1" "never ends"
mutation rotation -DNOSURVEY "-DLIVE -DN=1 -DM=3 -DFAILOVERS=0 -DEMERGENCIES=1" "never ends"

design ring "jwt" ""
design ring "encryption-key" "-DENCRYPT"
design ring "api-key with a previous_field" "-DAPIKEY"
mutation ring -DNOTAHEAD
mutation ring -DUNREAD
mutation ring -DNOTKEPT
mutation ring -DEARLYGRACE
mutation ring -DEARLYDATE
mutation ring -DBACKDROPS
mutation ring -DSIGNSON
mutation ring -DNOWAIT
mutation ring -DENDRETIRES -DENCRYPT
mutation ring -DUNACKED -DENCRYPT
mutation ring -DFORGETSKEYS -DENCRYPT
mutation ring -DCLEARFIRST -DAPIKEY

design kept "with version numbers" ""
design kept "without version numbers" "-DNUMBERLESS"
mutation kept -DASKAGAIN
mutation kept -DNOWAIT
mutation kept -DNOINTENT
mutation kept -DASSUME
mutation kept -DLATECANCEL

design units "two roles, one document, one consumer" ""
mutation units -DPROMOTEALONE
mutation units -DPUBLISHEACH
mutation units -DBACKEACH
mutation units -DRETIREALONE
mutation units -DBACKALONE "" deadlock
mutation units -DNOAGREE
mutation units -DRESTARTEACH

design consumers "two rotations, each twice: reserve all at once, exclusively" ""
mutation consumers -DONEBYONE "" deadlock
mutation consumers -DNORESERVE
mutation consumers -DNORELEASE "" deadlock
mutation consumers -DNOABANDON "" deadlock

design joined "deliveries are shared, and who shared one that failed goes on alone" ""
mutation joined -DNOBARRIER
mutation joined -DNOBACKBARRIER
mutation joined -DALLGUILTY
mutation joined -DHOLDON "" deadlock
