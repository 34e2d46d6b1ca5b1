package sockaddr

type routeInfo struct{}
