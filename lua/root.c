/* Where the Lua modules are: with the library or program that runs, so that an installed prefix may be moved; in the
 * source tree for what runs from the build folder. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "lua/binding.h"

/* The real path of the file that holds this code. */
static bool own_path(char *path) {
    Dl_info info;
    char name[PATH_MAX];
    /* The program's own name may be a bare word that was looked up in PATH. */
    if (dladdr((const void *)USL_LUA_SOURCE_DIR, &info) && info.dli_fname && strchr(info.dli_fname, '/'))
        return realpath(info.dli_fname, path) != NULL;
    ssize_t n = readlink("/proc/self/exe", name, sizeof name - 1);
    if (n <= 0) return false;
    name[n] = '\0';
    return realpath(name, path) != NULL;
}

static bool is_root(lua_State *L, const char *folder) {
    bool is = access(lua_pushfstring(L, "%s/unsloth/init.lua", folder), R_OK) == 0;
    lua_pop(L, 1);
    return is;
}

/* Made by this build and not installed. */
static bool is_built(const char *path) {
    char folder[PATH_MAX];
    if (!realpath(USL_BUILD_DIR, folder)) return false;
    size_t n = strlen(folder);
    return strncmp(path, folder, n) == 0 && path[n] == '/';
}

void ulua_push_root(lua_State *L) {
    /* From where a program, a library and a Lua C module are installed. */
    static const char *const WAYS[] = { USL_MODULES_FROM_BIN, USL_MODULES_FROM_LIB, USL_MODULES_FROM_CMOD };
    char own[PATH_MAX];
    if (own_path(own) && !is_built(own)) {
        *strrchr(own, '/') = '\0';
        for (size_t i = 0; i < sizeof WAYS / sizeof *WAYS; i++) {
            char resolved[PATH_MAX];
            const char *folder = lua_pushfstring(L, "%s/%s", own, WAYS[i]);
            if (is_root(L, folder)) {
                if (realpath(folder, resolved)) lua_pushstring(L, resolved), lua_remove(L, -2);
                return;
            }
            lua_pop(L, 1);
        }
        if (is_root(L, USL_MODULES_INSTALLED)) { /* linked statically into a host */
            lua_pushliteral(L, USL_MODULES_INSTALLED);
            return;
        }
    }
    lua_pushliteral(L, USL_LUA_SOURCE_DIR);
}
