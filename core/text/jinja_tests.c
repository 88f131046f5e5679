/* Tests: what stands behind `is`. */
#include <string.h>

#include "core/text/jinja_parts.h"

#define CALL(name) static usli_jval name(usli_jinja *j, usli_jval self, usli_jval *a, const usli_jargs *raw)
#define UNUSED (void)j, (void)self, (void)a, (void)raw
#define TEST(name, expr)          \
    CALL(name) {                  \
        UNUSED;                   \
        return usli_j_bool(expr); \
    }

static bool iterable(usli_jval v) {
    return v.type == J_UNDEFINED || v.type == J_STR || v.type == J_SEQ || v.type == J_DICT || v.type == J_LOOP;
}

/* What has a length and places: dictionaries too, as Python sees it. */
static bool sequence(usli_jval v) {
    return v.type == J_UNDEFINED || v.type == J_STR || v.type == J_DICT ||
           (v.type == J_SEQ && v.u.q->flavour <= J_RANGE);
}

static bool same(usli_jval x, usli_jval y) {
    if (x.type != y.type) return false;
    switch (x.type) {
    case J_NONE: return true;
    case J_BOOL: return x.u.b == y.u.b;
    case J_INT: return x.u.i == y.u.i;
    default: return x.u.s == y.u.s;
    }
}

static int64_t rest(usli_jinja *j, usli_jval v, int64_t by) {
    int64_t i = usli_j_want_int(j, v, "the number"), m;
    if (by == 0) usli_j_raise(j, "division by zero");
    if (by == -1) return 0;
    m = i % by;
    return m < 0 ? -m : m;
}

static bool all_cased(usli_jinja *j, usli_jval v, usli_jcase how) {
    usli_jval s = usli_j_str(j, v);
    return usli_j_equal(j, s, usli_j_case(j, s, how)) &&
           !usli_j_equal(j, usli_j_case(j, s, J_UPPER), usli_j_case(j, s, J_LOWER));
}

TEST(is_defined, self.type != J_UNDEFINED)
TEST(is_undefined, self.type == J_UNDEFINED)
TEST(is_none, self.type == J_NONE)
TEST(is_boolean, self.type == J_BOOL)
TEST(is_true, self.type == J_BOOL && self.u.b)
TEST(is_false, self.type == J_BOOL && !self.u.b)
TEST(is_integer, self.type == J_INT)
TEST(is_float, self.type == J_FLOAT)
TEST(is_number, usli_j_is_number(self))
TEST(is_string, self.type == J_STR)
TEST(is_mapping, self.type == J_DICT)
TEST(is_iterable, iterable(self))
TEST(is_sequence, sequence(self))
TEST(is_callable, self.type == J_FUNC || self.type == J_LOOP || self.type == J_UNDEFINED)
TEST(is_escaped, self.type == J_STR && self.markup)
TEST(is_sameas, same(self, a[0]))
TEST(is_eq, usli_j_equal(j, self, a[0]))
TEST(is_ne, !usli_j_equal(j, self, a[0]))
TEST(is_lt, usli_j_compare(j, self, a[0], "<") < 0)
TEST(is_le, usli_j_compare(j, self, a[0], "<=") <= 0)
TEST(is_gt, usli_j_compare(j, self, a[0], ">") > 0)
TEST(is_ge, usli_j_compare(j, self, a[0], ">=") >= 0)
TEST(is_in, usli_j_contains(j, a[0], self))
TEST(is_odd, rest(j, self, 2) == 1)
TEST(is_even, rest(j, self, 2) == 0)
TEST(is_divisibleby, rest(j, self, usli_j_want_int(j, a[0], "the divisor")) == 0)
TEST(is_upper, all_cased(j, self, J_UPPER))
TEST(is_lower, all_cased(j, self, J_LOWER))
TEST(is_filter, self.type == J_STR && usli_j_filter(self.u.s))
TEST(is_test, self.type == J_STR && usli_j_test(self.u.s))

static const usli_jrow TESTS[] = {
    { "defined", "", is_defined, 0 },
    { "undefined", "", is_undefined, 0 },
    { "none", "", is_none, 0 },
    { "boolean", "", is_boolean, 0 },
    { "true", "", is_true, 0 },
    { "false", "", is_false, 0 },
    { "integer", "", is_integer, 0 },
    { "float", "", is_float, 0 },
    { "number", "", is_number, 0 },
    { "string", "", is_string, 0 },
    { "mapping", "", is_mapping, 0 },
    { "iterable", "", is_iterable, 0 },
    { "sequence", "", is_sequence, 0 },
    { "callable", "", is_callable, 0 },
    { "escaped", "", is_escaped, 0 },
    { "sameas", "other", is_sameas, 0 },
    { "eq", "b", is_eq, 0 },
    { "equalto", "b", is_eq, 0 },
    { "==", "b", is_eq, 0 },
    { "ne", "b", is_ne, 0 },
    { "!=", "b", is_ne, 0 },
    { "lt", "b", is_lt, 0 },
    { "lessthan", "b", is_lt, 0 },
    { "<", "b", is_lt, 0 },
    { "le", "b", is_le, 0 },
    { "<=", "b", is_le, 0 },
    { "gt", "b", is_gt, 0 },
    { "greaterthan", "b", is_gt, 0 },
    { ">", "b", is_gt, 0 },
    { "ge", "b", is_ge, 0 },
    { ">=", "b", is_ge, 0 },
    { "in", "seq", is_in, 0 },
    { "odd", "", is_odd, 0 },
    { "even", "", is_even, 0 },
    { "divisibleby", "num", is_divisibleby, 0 },
    { "upper", "", is_upper, 0 },
    { "lower", "", is_lower, 0 },
    { "filter", "", is_filter, 0 },
    { "test", "", is_test, 0 },
};

const usli_jrow *usli_j_test(const usli_jstr *name) {
    usli_jval v = { .type = J_STR, .u.s = (usli_jstr *)(uintptr_t)name };
    for (size_t i = 0; i < sizeof TESTS / sizeof *TESTS; i++)
        if (usli_j_is_text(v, TESTS[i].name)) return &TESTS[i];
    return NULL;
}
