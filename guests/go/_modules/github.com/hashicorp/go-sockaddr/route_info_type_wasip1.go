package sockaddr

type routeInfo struct {
	cmds map[string][]string
}
