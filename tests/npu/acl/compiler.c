/* libacl_op_compiler.so: options are taken and forgotten; there is no operator compiler. */
#include <stddef.h>
#include <stdint.h>

int aclSetCompileopt(int option, const char *value) { return 0; }
size_t aclGetCompileoptSize(int option) { return 2; }
int aclGetCompileopt(int option, char *value, size_t size) {
    value[0] = '0';
    if (size > 1)
        value[1] = 0;
    return 0;
}
int aclopSetCompileFlag(int flag) { return 0; }
int aclopCompileAndExecuteV2(const char *name) { return 100024; }
int aclGenGraphAndDumpForOp(const char *name) { return 100024; }

/* The plugin looks for these here. */
int aclrtSetSysParamOpt(int option, int64_t value) { return 0; }
int aclrtCtxSetSysParamOpt(int option, int64_t value) { return 0; }
int aclrtGetSysParamOpt(int option, int64_t *value) {
    *value = 0;
    return 0;
}
