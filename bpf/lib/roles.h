/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* Who dials, by the cgroup of the process. */
#ifndef MYCEL_ROLES_H
#define MYCEL_ROLES_H

#include "lib/helpers.h"

inline_always u32 role_of_current(void)
{
	u64 cgroup = current_cgroup_id();
	u32 *role = map_lookup(MAP(ROLES), &cgroup);

	return role ? *role : ROLE_NONE;
}

#endif
